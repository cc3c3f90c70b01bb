"""Options that several commands share, and how they are turned into samples, a store, a terminal."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladezeit.errors import LadezeitError
from ladezeit.results.format import LOG_WIDTH

if TYPE_CHECKING:
    from rich.console import Console

    from ladezeit.results.reader import Samples
    from ladezeit.results.records import Result
    from ladezeit.tracking.mlflow_tracker import MlflowTracker

_MOST_LINES = 10
_MOST_NAMED = 20

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
Job = Annotated[int | None, typer.Option(help="The number of the sample's job: its folder in the sweep.")]
Label = Annotated[str | None, typer.Option(help="The sample's label, as in cold·streamed·#2.")]
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
        samples = read_paths(paths or [_newest()], with_profiled=with_profiled)
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


def _newest() -> Path:
    from ladezeit.results.reader import newest_sweep

    folder = newest_sweep(Path(os.environ.get("LADEZEIT_OUTPUTS", "outputs")) / "sweeps")
    print(f"reading {folder}", file=sys.stderr)
    return folder


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


# One of the samples.


def choose_sample(samples: "Samples", job: int | None, label: str | None) -> tuple["Result", str]:
    """Return the sample and its place.

    Raises:
        LadezeitError: none or several fit; the text lists what there is.
    """
    pairs = list(zip(samples.results, samples.places, strict=True))
    fitting = [
        (result, place)
        for result, place in pairs
        if (job is None or result.identity.job == job) and (label is None or result.identity.label == label)
    ]
    if len(fitting) == 1:
        return fitting[0]
    listed = fitting or pairs
    lines = [
        f"  --job {r.identity.job}  {r.identity.label}  {r.status.value}  {place}" for r, place in listed[:_MOST_NAMED]
    ]
    lines += [f"  … and {len(listed) - _MOST_NAMED} more"] if len(listed) > _MOST_NAMED else []
    found = "no sample fits" if not fitting else f"{len(fitting)} samples fit"
    raise LadezeitError("\n".join([f"{found}: choose one by --job, --label, --where or its folder", *lines]))


def make_console() -> "Console":
    """Return a console for stdout; $COLUMNS sets the width of what goes into a pipe."""
    from rich.console import Console

    own = Console(highlight=False)
    if not own.is_terminal and not os.environ.get("COLUMNS"):
        own.width = LOG_WIDTH
    return own


# The MLflow store that commands write to or show.

StoreExperiment = Annotated[str, typer.Option(help="The MLflow experiment.")]
DEFAULT_EXPERIMENT = "ladezeit"


def outputs_folder() -> Path:
    """Return the outputs folder: $LADEZEIT_OUTPUTS, or ``outputs`` here."""
    return Path(os.environ.get("LADEZEIT_OUTPUTS", "outputs")).absolute()


def open_store(experiment: str, uri: str | None) -> "MlflowTracker":
    """Open the store that the options name, creating a sqlite file that is not there yet.

    Raises:
        TrackingError: nothing answers there, or it is no store.
    """
    from ladezeit.config import TrackingConfig, TrackingKind
    from ladezeit.tracking import open_tracker
    from ladezeit.tracking.mlflow_tracker import MlflowTracker

    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    kind = TrackingKind.sqlite if uri is None or uri.startswith("sqlite:") else TrackingKind.server
    tracker = open_tracker(TrackingConfig(kind=kind, uri=uri, experiment=experiment), outputs_folder())
    assert isinstance(tracker, MlflowTracker)
    return tracker
