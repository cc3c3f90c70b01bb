"""`ladezeit-results report`: one Markdown and one self-contained HTML file for whoever has to decide."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladezeit.cli.results_commands.sources import Current, Experiment, Paths, TrackingUri, Where, read_source

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
    from ladezeit.errors import LadezeitError
    from ladezeit.report.document import build_report
    from ladezeit.report.render import archive_report as keep_report
    from ladezeit.report.render import write_report
    from ladezeit.results.fields import parse_conditions

    if keep is not None and output is not None:
        raise LadezeitError("give either --output or --keep, not both")
    samples = read_source(paths, experiment, tracking_uri, where)
    report = build_report(samples, current=parse_conditions(current) if current else None)
    if keep is not None:
        written = keep_report(report, keep, name or re.sub(r"[^\w.+-]+", "-", report.title))
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
