"""`ladezeit-results rerun`: the command that repeats a sample, or a whole configuration."""

from typing import Annotated

import typer

from ladezeit.cli.results_commands.one_sample import Job, Label, choose_sample
from ladezeit.cli.results_commands.sources import Experiment, Paths, TrackingUri, Where, read_source


def rerun_command(
    paths: Paths = None,
    *,
    experiment: Experiment = None,
    tracking_uri: TrackingUri = None,
    where: Where = None,
    job: Job = None,
    label: Label = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Repeat the sample's configuration this many times, as a sweep.")
    ] = None,
) -> None:
    """Print the exact command that measures a sample again; nothing is run."""
    from ladezeit.results.fields import point_command

    result, _ = choose_sample(read_source(paths, experiment, tracking_uri, where, with_profiled=True), job, label)
    if samples is None:
        print(result.identity.command)
        return
    print(point_command(result, samples))
