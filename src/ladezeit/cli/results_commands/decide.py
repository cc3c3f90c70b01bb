"""The commands that decide: `compare` (a table), `verdict` (which method to use), `check` (the gate for CI)."""

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladezeit.cli.results_commands.options import (
    AcrossMachines,
    Baseline,
    Current,
    Experiment,
    Paths,
    TrackingUri,
    Where,
    make_console,
    read_source,
    report_skipped,
)
from ladezeit.errors import LadezeitError

if TYPE_CHECKING:
    from ladezeit.analysis.comparison import Comparison
    from ladezeit.analysis.decision import Decision
    from ladezeit.analysis.regression import Check
    from ladezeit.results.reader import Samples
    from ladezeit.results.records import Result

#: Exit code of `check` for a significant slowdown, a lost verification or a missing configuration.
FAILED = 1


class TableFormat(Enum):
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
    format: Annotated[TableFormat, typer.Option(help="How it is written.")] = TableFormat.table,
    across_machines: AcrossMachines = False,
) -> None:
    """Compare configurations: median, spread, ratio to the baseline, exact test, shared ranks."""
    from ladezeit.analysis.comparison import CONDITIONS, compare_points
    from ladezeit.analysis.eligibility import metric_named
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
    _write_comparison(compared, samples, format, sort)


def _write_comparison(compared: "Comparison", samples: "Samples", format: TableFormat, sort: str) -> None:
    from ladezeit.report import comparison_table as text

    if format is TableFormat.table:
        screen = make_console()
        screen.print(text.as_rich(compared, screen.width, sort))
    elif format is TableFormat.md:
        print(text.as_markdown(compared, sort), end="")
    elif format is TableFormat.csv:
        print(text.as_csv(compared, sort), end="")
    else:
        print(text.as_json(compared, sort, unreadable=samples.unreadable, left_out=samples.left_out))


class VerdictFormat(Enum):
    """How the verdict is written."""

    text = "text"
    md = "md"
    json = "json"


def verdict_command(
    paths: Paths = None,
    *,
    experiment: Experiment = None,
    tracking_uri: TrackingUri = None,
    where: Where = None,
    current: Current = None,
    format: Annotated[VerdictFormat, typer.Option(help="How it is written.")] = VerdictFormat.text,
    write_profile: Annotated[
        Path | None,
        typer.Option(
            help="Write the best methods as a loading profile: YAML, or JSON keyed by model if the name ends in .json."
        ),
    ] = None,
) -> None:
    """Decide: the best method per model and cache state, what the current one costs, where the time goes."""
    from ladezeit.analysis.decision import decide_methods
    from ladezeit.report.document import what_was_read
    from ladezeit.report.verdict import as_document, as_markdown
    from ladezeit.results.fields import parse_conditions

    samples = read_source(paths, experiment, tracking_uri, where)
    decisions, notes = decide_methods(
        samples.results, samples.varying, current=parse_conditions(current) if current else None
    )
    if format is VerdictFormat.json:
        read = {"unreadable": samples.unreadable, "left_out": samples.left_out, "samples_missing": samples.missing}
        document = as_document(decisions, notes, read=what_was_read(samples), **read)
        print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        words = as_markdown(decisions, notes, what_was_read(samples))
        if format is VerdictFormat.md:
            print(words, end="")
        else:
            from rich.markdown import Markdown

            make_console().print(Markdown(words))
    if write_profile is not None:
        _write_profile(write_profile, samples, decisions)


def _write_profile(path: Path, samples: "Samples", decisions: "list[Decision]") -> None:
    from ladezeit.analysis import profile_writer

    written = profile_writer.write_profile(path, decisions)
    typer.echo(f"wrote {path}: {', '.join(written)}", err=True)


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
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON here.")] = None,
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
    _write_check(checked, baseline, new, junit, json_path)
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


def _write_check(checked: "Check", baseline: str, new: "Samples", junit: Path | None, json_path: Path | None) -> None:
    from datetime import UTC, datetime

    from ladezeit.redaction import redact_text
    from ladezeit.report.gate import as_document, as_junit

    sweeps = sorted({result.identity.sweep for result in new.results if result.identity.sweep})
    read = {"baseline": redact_text(baseline), "new": ", ".join(sweeps) or "single results"}
    if junit is not None:
        _save(junit, as_junit(checked, datetime.now(UTC), read))
    if json_path is not None:
        _save(json_path, as_document(checked, **read) + "\n")


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as cause:
        raise LadezeitError(f"{path} cannot be written: {cause.strerror}") from None
