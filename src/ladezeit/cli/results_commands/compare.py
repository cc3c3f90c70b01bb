"""`ladezeit-results compare`: all configurations in one table, ranked where they can be told apart."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from ladezeit.cli.results_commands.sources import (
    AcrossMachines,
    Baseline,
    Experiment,
    Paths,
    TrackingUri,
    Where,
    read_source,
)

if TYPE_CHECKING:
    from ladezeit.analysis.comparison import Comparison
    from ladezeit.results.reader import Samples


class Format(Enum):
    """How the comparison is written."""

    table = "table"
    csv = "csv"
    json = "json"
    md = "md"


def compare_command(
    paths: Paths = None,
    *,
    experiment: Experiment = None,
    tracking_uri: TrackingUri = None,
    metric: Annotated[
        str, typer.Option(help="load, cold_start, gpu_memory, host_memory, or any metric of a result.")
    ] = "load",
    where: Where = None,
    baseline: Baseline = None,
    by: Annotated[
        str | None, typer.Option(help="Keys in which configurations must agree. Default: model,cache,process,device.")
    ] = None,
    sort: Annotated[str, typer.Option(help="rank, median, min, mad, n, or a key that varies.")] = "rank",
    format: Annotated[Format, typer.Option(help="How it is written.")] = Format.table,
    across_machines: AcrossMachines = False,
) -> None:
    """Compare configurations: median, spread, ratio to the baseline, exact test, shared ranks."""
    from ladezeit.analysis.comparison import CONDITIONS, compare_points
    from ladezeit.analysis.eligibility import metric_named
    from ladezeit.errors import LadezeitError
    from ladezeit.results.fields import parse_conditions

    samples = read_source(paths, experiment, tracking_uri, where)
    compared = compare_points(
        samples.results,
        samples.varying,
        metric=metric_named(metric, samples.results),
        baseline=parse_conditions(baseline) if baseline else None,
        by=[key.strip() for key in by.split(",") if key.strip()] if by is not None else CONDITIONS,
        across_machines=across_machines,
    )
    known = ("rank", "median", "min", "mad", "n", *compared.keys)
    if sort not in known:
        raise LadezeitError(f"--sort {sort}: use one of {', '.join(known)}")
    _write(compared, samples, format, sort)


def _write(compared: "Comparison", samples: "Samples", format: Format, sort: str) -> None:
    from ladezeit.cli.results_commands.printing import make_console
    from ladezeit.report import comparison_table as data
    from ladezeit.report import comparison_table as text

    if format is Format.table:
        screen = make_console()
        screen.print(text.as_rich(compared, screen.width, sort))
    elif format is Format.md:
        print(text.as_markdown(compared, sort), end="")
    elif format is Format.csv:
        print(data.as_csv(compared, sort), end="")
    else:
        print(data.as_json(compared, sort, unreadable=samples.unreadable, left_out=samples.left_out))
