"""Where the commands read from: options that all of them share, and what is said about what was read."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladezeit.errors import LadezeitError

if TYPE_CHECKING:
    from ladezeit.results.reader import Samples

_MOST_LINES = 10

Current = Annotated[
    list[str] | None,
    typer.Option("--current", metavar="KEY=VALUE", help="The config in use. Default: loading=transformers."),
]
Paths = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Folders of sweeps or runs, result.json or kept .jsonl files. Default: the newest in outputs/sweeps."
    ),
]
Experiment = Annotated[str | None, typer.Option(help="Read this MLflow experiment instead of files.")]
TrackingUri = Annotated[
    str | None, typer.Option(help="The MLflow store. Default: $MLFLOW_TRACKING_URI, or outputs/mlflow.db.")
]
Where = Annotated[
    list[str] | None, typer.Option("--where", metavar="KEY=VALUE", help="Only samples with this; may be repeated.")
]
Baseline = Annotated[
    list[str] | None,
    typer.Option("--baseline", metavar="KEY=VALUE", help="What ratios refer to. Default: loading=transformers."),
]
AcrossMachines = Annotated[
    bool, typer.Option("--across-machines", help="Put samples of different machines side by side.")
]


def read_source(
    paths: list[Path] | None,
    experiment: str | None,
    uri: str | None,
    where: list[str] | None = None,
    *,
    with_profiled: bool = False,
) -> "Samples":
    """Read what the options name, say on stderr what was left out, and keep what `where` asks for.

    Samples that a profiler looked at are among them only `with_profiled`.

    Raises:
        LadezeitError: nothing can be read there, or the options contradict each other.
    """
    from ladezeit.results.fields import matches_conditions, parse_conditions, select_samples
    from ladezeit.results.reader import read_paths

    if experiment is None:
        if uri is not None:
            raise LadezeitError("--tracking-uri goes with --experiment NAME; without it files are read")
        samples = read_paths(paths or [newest_sweep()], with_profiled=with_profiled)
    else:
        from ladezeit.tracking.reader import read_experiment

        if paths:
            raise LadezeitError("give either paths or --experiment, not both")
        samples = read_experiment(experiment, uri, with_profiled=with_profiled)
    report_skipped(samples)
    if where:
        conditions = parse_conditions(where)
        select_samples(samples.results, conditions)
        kept = [index for index, result in enumerate(samples.results) if matches_conditions(result, conditions)]
        samples.places = [samples.places[index] for index in kept]
        samples.results = [samples.results[index] for index in kept]
    return samples


def newest_sweep() -> Path:
    """Return the newest sweep below the outputs folder; raises `LadezeitError` where there is none."""
    folder = Path(os.environ.get("LADEZEIT_OUTPUTS", "outputs")) / "sweeps"
    sweeps = sorted(path for path in folder.glob("*") if (path / "sweep.json").is_file())
    if not sweeps:
        raise LadezeitError(f"no sweep in {folder}: give the folder of a sweep, a result.json, or --experiment NAME")
    print(f"reading {sweeps[-1]}", file=sys.stderr)
    return sweeps[-1]


def report_skipped(samples: "Samples") -> None:
    """Say on stderr, where no table or JSON is disturbed, what is not among the samples."""
    if samples.unreadable:
        print(f"{len(samples.unreadable)} could not be read:", file=sys.stderr)
        for line in samples.unreadable[:_MOST_LINES]:
            print(f"  {line}", file=sys.stderr)
        if len(samples.unreadable) > _MOST_LINES:
            print(f"  … and {len(samples.unreadable) - _MOST_LINES} more", file=sys.stderr)
    for reason, places in samples.left_out_by_reason().items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        print(f"left out, {reason}: {places[0]}{more}", file=sys.stderr)
    if samples.missing:
        print(f"{samples.missing} planned samples have no result: the sweep is unfinished", file=sys.stderr)
