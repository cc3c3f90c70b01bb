"""`ladezeit-results check`: the gate for CI; nothing may get slower than allowed or lose its verification.

Exit codes: 0 the gate stays open, 1 a significant slowdown, a lost verification or a missing configuration, 2 usage.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladezeit.cli.results_commands.sources import (
    AcrossMachines,
    Experiment,
    Paths,
    TrackingUri,
    Where,
    read_source,
    report_skipped,
)
from ladezeit.errors import LadezeitError

if TYPE_CHECKING:
    from ladezeit.analysis.regression import Check
    from ladezeit.results.reader import Samples
    from ladezeit.results.records import Result

FAILED = 1


def check_command(
    paths: Paths = None,
    *,
    baseline: Annotated[
        str,
        typer.Option(help="What to compare with: a sweep folder, a result.json, an MLflow run ID, or an experiment."),
    ],
    max_slowdown: Annotated[str, typer.Option(metavar="PERCENT", help="The slowdown that is allowed, such as 10%.")],
    metric: Annotated[str, typer.Option(help="load, cold_start, gpu_memory, host_memory, or any metric.")] = "load",
    experiment: Experiment = None,
    tracking_uri: TrackingUri = None,
    where: Where = None,
    allow_missing: Annotated[
        bool,
        typer.Option("--allow-missing", help="Configurations of the baseline that were not measured now do not fail."),
    ] = False,
    across_machines: AcrossMachines = False,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here, one test case per configuration.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything as JSON here.")] = None,
) -> None:
    """Fail (exit 1) if a configuration is significantly slower than allowed, no longer verified, or missing."""
    from ladezeit.analysis.eligibility import metric_named
    from ladezeit.analysis.regression import check_regressions
    from ladezeit.report.gate import as_text
    from ladezeit.tracking.reader import exclude_samples, read_baseline

    limit = _share(max_slowdown)
    new = read_source(paths, experiment, None if experiment is None else tracking_uri, where)
    old = exclude_samples(read_baseline(baseline, tracking_uri), new)
    report_skipped(old)
    _keep(old, where)
    both = [*old.results, *new.results]
    _check_machines(both, across_machines)
    checked = check_regressions(
        old.results,
        new.results,
        _varying(old, new),
        limit=limit,
        metric=metric_named(metric, both),
        allow_missing=allow_missing,
    )
    _write(checked, baseline, new, junit, json)
    print(as_text(checked))
    if checked.failing:
        raise typer.Exit(FAILED)


def _share(text: str) -> float:
    number, percent, rest = text.replace(" ", "").partition("%")
    try:
        share = float(number) / 100
    except ValueError:
        share = -1.0
    if not percent or rest or not 0 <= share < float("inf"):
        raise LadezeitError(f"--max-slowdown {text}: write a percentage, as 10%")
    return share


def _keep(samples: "Samples", where: list[str] | None) -> None:
    from ladezeit.results.fields import matches_conditions, parse_conditions

    if where:
        conditions = parse_conditions(where)
        samples.results = [result for result in samples.results if matches_conditions(result, conditions)]
        if not samples.results:
            raise LadezeitError(f"no sample of the baseline has {' '.join(where)}")


def _check_machines(results: "list[Result]", across_machines: bool) -> None:
    from ladezeit.analysis.eligibility import check_one_machine, library_notes

    if not across_machines:
        check_one_machine(results)
    for note in library_notes(results):
        typer.echo(note, err=True)


def _varying(old: "Samples", new: "Samples") -> list[str]:
    """Return the keys that tell points apart on either side, without those that only tell the sides apart."""
    return list(dict.fromkeys([*new.varying, *old.varying]))


def _write(checked: "Check", baseline: str, new: "Samples", junit: Path | None, json: Path | None) -> None:
    from datetime import UTC, datetime

    from ladezeit.report.gate import as_document, as_junit
    from ladezeit.results.redaction import redact_text

    sweeps = sorted({result.identity.sweep for result in new.results if result.identity.sweep})
    read = {"baseline": redact_text(baseline), "new": ", ".join(sweeps) or "single results"}
    if junit is not None:
        _save(junit, as_junit(checked, datetime.now(UTC), read))
    if json is not None:
        _save(json, as_document(checked, **read) + "\n")


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as cause:
        raise LadezeitError(f"{path} cannot be written: {cause.strerror}") from None
