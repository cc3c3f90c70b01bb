"""What of a result goes to MLflow, and under which names; nothing here talks to MLflow.

Params are the keys that vary, so that the charts compare what differs; everything constant is a tag. The status of a
run in MLflow says whether there is a measurement: FINISHED for `ok`, KILLED for what was ended or never began
(`killed`, `skipped`), FAILED for the rest. The exact status is the tag ``ladezeit.status``.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ladezeit.config import NOT_MEASURED
from ladezeit.redaction import redact_text
from ladezeit.results.fields import as_text, failure_reason, varying_values
from ladezeit.results.format import format_seconds
from ladezeit.results.records import Phase, Result, Status, SweepRecord

RUN_STATUS = dict.fromkeys(Status, "FAILED") | {
    Status.ok: "FINISHED",
    Status.killed: "KILLED",
    Status.skipped: "KILLED",
}

IDENTITY_TAG = "ladezeit.identity"
SWEEP_TAG = "ladezeit.sweep"
ROLE_TAG = "ladezeit.role"
STATUS_TAG = "ladezeit.status"
NOTE_TAG = "mlflow.note.content"
PARENT_TAG = "mlflow.parentRunId"
REASON_TAG = "ladezeit.reason"
#: When a run was made, as an ISO time: its start in MLflow is that of the measurement.
CREATED_TAG = "ladezeit.created"
#: Where the files of a sweep, or of a sample, lay on the machine that opened its run.
FOLDER_TAG = "ladezeit.folder"

MOST_VALUE = 6000
MOST_NOTE = 8000
MOST_NAME = 20
PHASES_FILE = "phases.json"
_DIGITS = 6
_NOTE_PHASES = 20


def identity_of(result: Result) -> str:
    """Return what makes a sample this sample and no other: 16 hexadecimal digits."""
    known = result.identity
    parts = (known.sweep, known.job, known.point, known.sample, result.started_at)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def condition_of(of: Result | SweepRecord, role: str | None = None) -> str:
    """Return MLflow's search for the runs of a sample, or for those of a sweep, which may be limited to one `role`."""
    if isinstance(of, Result):
        return f"tags.`{IDENTITY_TAG}` = '{identity_of(of)}' and tags.`{ROLE_TAG}` = 'sample'"
    only = f" and tags.`{ROLE_TAG}` = '{role}'" if role else ""
    return f"tags.`{SWEEP_TAG}` = '{sweep_tag(of.id)}'{only}"


def sweep_tag(sweep_id: str) -> str:
    """Return a sweep's id in characters that MLflow's search and addresses take."""
    return re.sub(r"[^\w.+=@-]", "_", sweep_id)


def started_ms(started_at: str) -> int:
    """Return an ISO time as milliseconds since 1970; a time without a zone is taken as UTC."""
    moment = datetime.fromisoformat(started_at)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return int(moment.timestamp() * 1000)


def ended_ms(result: Result) -> int:
    """Return when the sample ended, in milliseconds since 1970."""
    return started_ms(result.started_at) + round(1000 * result.metrics.get("sample/wall_s", 0.0))


def params_of(result: Result, varying: Sequence[str]) -> dict[str, str]:
    """Return the varying config keys with their values, and the sample's number."""
    params = {key: value for key, value in varying_values(result, varying).items() if value}
    params["sample"] = str(result.identity.sample)
    return {_key(key): truncate_text(redact_text(value)) for key, value in params.items()}


def metrics_of(result: Result) -> dict[str, float]:
    """Return the metrics, rounded to six significant digits where they are no whole numbers; none is inf or nan."""
    finite = {key: value for key, value in result.metrics.items() if math.isfinite(value)}
    return {_key(key): _rounded(value) for key, value in finite.items()}


def _rounded(value: float) -> float:
    return float(value) if float(value).is_integer() else float(f"{value:.{_DIGITS}g}")


def tags_of(result: Result, sweep: SweepRecord | None) -> dict[str, str]:
    """Return all else that is known and small: status, identity, configuration, machine, versions, verification."""
    tags = {
        STATUS_TAG: result.status.value,
        "ladezeit.point": result.identity.point,
        "ladezeit.sweep.job": str(result.identity.job),
        "ladezeit.command": result.identity.command,
        "mlflow.source.name": "ladezeit",
        "mlflow.source.type": "LOCAL",
        "mlflow.loggedArtifacts": json.dumps([{"path": PHASES_FILE, "type": "table"}]),
    }
    if result.status is not Status.ok:
        tags[REASON_TAG] = failure_reason(result)
    if result.error is not None:
        tags["ladezeit.error"] = result.error.type
    if sweep is not None:
        tags |= {"ladezeit.title": sweep.title, "ladezeit.host": sweep.host}
        if sweep.git_commit:
            tags["mlflow.source.git.commit"] = sweep.git_commit
    measured = {key: value for key, value in result.config.items() if key not in NOT_MEASURED}
    known = {"config": measured, "environment": result.environment, "effective": result.effective}
    for prefix, node in {**known, "proof": result.proof or {}}.items():
        tags |= dict(_flat(node, prefix))
    return {_key(key): truncate_text(redact_text(value)) for key, value in tags.items() if value}


def _flat(node: Mapping[str, Any], prefix: str, depth: int = 2) -> Iterator[tuple[str, str]]:
    """Yield dotted keys down to `depth` levels; what lies deeper (a device map) stays one JSON value."""
    for name, value in node.items():
        key = f"{prefix}.{name}"
        if isinstance(value, Mapping) and depth > 1:
            yield from _flat(value, key, depth - 1)
        elif value is not None:
            yield key, as_text(value)


def parent_tags(record: SweepRecord, versions: Mapping[str, str]) -> dict[str, str]:
    """Return the tags of a sweep's own run."""
    tags = {
        SWEEP_TAG: sweep_tag(record.id),
        ROLE_TAG: "sweep",
        "ladezeit.title": record.title,
        "ladezeit.command": record.command,
        "ladezeit.host": record.host,
        "ladezeit.varying": ", ".join(record.varying),
        "ladezeit.samples_planned": str(record.samples_planned),
        "mlflow.source.name": "ladezeit",
        "mlflow.source.type": "LOCAL",
        **{f"versions.{name}": version for name, version in versions.items()},
    }
    if record.git_commit:
        tags["mlflow.source.git.commit"] = record.git_commit
    return {_key(key): truncate_text(redact_text(value)) for key, value in tags.items()}


def run_name(result: Result) -> str:
    """Return the sample's label in as many characters as MLflow's lists show."""
    return redact_text(result.identity.label)[:MOST_NAME] or f"#{result.identity.sample}"


def note_of(result: Result, run_id: str, with_timeline: bool) -> str:
    """Return the run's description in Markdown: what it is, how it ended, how to repeat it, where the time went."""
    total = result.metrics.get("load/total_s")
    head = [f"**{result.status.value}**", *([f"load **{format_seconds(total)} s**"] if total is not None else [])]
    head += [f"{key} {value}" for key, value in varying_values(result, ("model", "loading", "cache")).items() if value]
    parts = [" · ".join(head)]
    if result.status is not Status.ok:
        parts.append(f"{failure_reason(result)}")
    parts.append(f"Repeat it: `{result.identity.command}`")
    if result.phases:
        parts.append(_phase_lines(result.phases))
    if with_timeline:
        parts.append(f"![timeline](get-artifact?path=timeline.png&run_uuid={run_id})")
    return as_note("\n\n".join(parts))


def as_note(markdown: str) -> str:
    """Return Markdown as MLflow's description of a run: without credentials, cut visibly, its tables set apart.

    MLflow draws the cells of a table without any space between them.
    """
    lines = [
        line.replace(" | ", "&emsp;| ") if line.startswith("|") and "--" not in line else line
        for line in redact_text(markdown).split("\n")
    ]
    return truncate_text("\n".join(lines), MOST_NOTE)


def _phase_lines(phases: Sequence[Phase]) -> str:
    longest = sorted(phases, key=lambda phase: -phase.self_s)[:_NOTE_PHASES]
    shown = sorted(longest, key=lambda phase: phase.start_s)
    rows = [
        f"| {p.path} | {format_seconds(p.start_s)} | {format_seconds(p.duration_s)} | {format_seconds(p.self_s)} |"
        for p in shown
    ]
    return "\n".join(["| phase | start s | duration s | self s |", "| :-- | --: | --: | --: |", *rows])


def phases_table(phases: Sequence[Phase]) -> str:
    """Return the phases as the JSON that `mlflow.load_table` reads."""
    rows = [[p.path, p.start_s, p.duration_s, p.self_s] for p in sorted(phases, key=lambda phase: phase.start_s)]
    return json.dumps({"columns": ["path", "start_s", "duration_s", "self_s"], "data": rows})


def truncate_text(text: str, most: int = MOST_VALUE) -> str:
    """Return `text`, visibly shortened where it is longer than `most` characters (MLflow would cut it silently)."""
    if len(text) <= most:
        return text
    mark = f" … (cut, {len(text)} characters)"
    return text[: most - len(mark)] + mark


def _key(name: str) -> str:
    """Return a name in the characters that MLflow allows for keys."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:250]
