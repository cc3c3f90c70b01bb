"""The commands that present: `report`, `show`, `rerun` (one sample's command), `hand-over` (other servers' flags)."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladezeit.cli.results_commands.options import (
    Current,
    Experiment,
    Job,
    Label,
    Paths,
    TrackingUri,
    Where,
    choose_sample,
    make_console,
    read_source,
)
from ladezeit.errors import LadezeitError

if TYPE_CHECKING:
    from ladezeit.results.reader import Samples


def report_command(
    paths: Paths = None,
    *,
    experiment: Experiment = None,
    tracking_uri: TrackingUri = None,
    where: Where = None,
    current: Current = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write into. Default: 'report' in the sweep's folder, or here if there is none."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the files. Default: report; kept: the title.")] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Write it for version control instead: Markdown, pictures and all raw results, as in docs/results."
        ),
    ] = None,
) -> None:
    """Write the verdict, all tables, pictures, environment and commands as one report (Markdown and HTML)."""
    from ladezeit.report.document import build_report
    from ladezeit.report.render import archive_report, write_report
    from ladezeit.results.fields import parse_conditions

    if keep is not None and output is not None:
        raise LadezeitError("give either --output or --keep, not both")
    samples = read_source(paths, experiment, tracking_uri, where)
    report = build_report(samples, current=parse_conditions(current) if current else None)
    if keep is not None:
        written = archive_report(report, keep, name or re.sub(r"[^\w.+-]+", "-", report.title))
    else:
        written = write_report(report, output or _beside(samples), name or "report")
    print("\n".join(str(path) for path in written))


def _beside(samples: "Samples") -> Path:
    """Return the folder `report` in the folder of the sweep that was read; below the working directory otherwise."""
    for place in samples.places:
        for folder in Path(place).parents:
            if (folder / "sweep.json").is_file():
                return folder / "report"
    return Path("report")


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
    from ladezeit.report.sample_view import as_rich

    result, place = choose_sample(read_source(paths, experiment, tracking_uri, where, with_profiled=True), job, label)
    make_console().print(as_rich(result, place))


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


def hand_over_command(
    profile: Annotated[Path, typer.Argument(help="A loading profile in YAML (verdict --write-profile).")],
    *,
    model: Annotated[
        str | None,
        typer.Option(help="The model argument for the servers: a hub ID or a folder. Default: the profile's name."),
    ] = None,
) -> None:
    """Print the vLLM and SGLang flags that load like the measured method, or say that there are none."""
    from ladezeit.analysis import profile_writer
    from ladezeit.report.server_flags import as_text, export_flags

    for name, entries in profile_writer.read_profile(profile).items():
        for entry in entries:
            print(as_text(export_flags({"model": name, **entry}, model)))
