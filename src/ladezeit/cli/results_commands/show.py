"""`ladezeit-results show`: everything about one sample."""

from ladezeit.cli.results_commands.one_sample import Job, Label, choose_sample
from ladezeit.cli.results_commands.sources import Experiment, Paths, TrackingUri, Where, read_source


def show_command(
    paths: Paths = None,
    *,
    experiment: Experiment = None,
    tracking_uri: TrackingUri = None,
    where: Where = None,
    job: Job = None,
    label: Label = None,
) -> None:
    """Show one sample: how it ended, phases with shares, effective settings, verification, environment, files."""
    from ladezeit.cli.results_commands.printing import make_console
    from ladezeit.report.sample_view import as_rich

    result, place = choose_sample(read_source(paths, experiment, tracking_uri, where, with_profiled=True), job, label)
    make_console().print(as_rich(result, place))
