"""The result of a sample: its type and its file, ``result.json``, the truth that everything else is projected from.

The schema is documented in ``docs/result.md``; `SCHEMA_VERSION` changes when a reader of the old one would misread the
new one.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from ladezeit.errors import LadezeitError
from ladezeit.system.files import write_atomically

SCHEMA_VERSION = 1
FILE_NAME = "result.json"
SWEEP_FILE_NAME = "sweep.json"
#: Written beside it for people: the table and the folder of the report of a sweep, the picture of a sample.
SUMMARY_FILE = "summary.md"
REPORT_FOLDER = "report"
TIMELINE_FILE = "timeline.png"


class Status(Enum):
    """How a sample ended. Only `ok` is a measurement that may be compared."""

    ok = "ok"  # loaded, verified as far as asked
    wrong = "wrong"  # loaded, but not what was asked for
    failed = "failed"  # an error while loading, validating or generating, or a crash
    oom = "oom"  # device or host memory ran out
    timeout = "timeout"  # ended by the time limit
    killed = "killed"  # ended by a signal from outside, or by Ctrl-C
    invalid = "invalid"  # the machine was not in the state that was asked for (page cache)
    skipped = "skipped"  # never started: the combination has no meaning on this machine


@dataclass(frozen=True)
class Phase:
    """A named span of a sample.

    `path` nests by ``/`` (``load/read``); `start_s` counts from the start of the sample's process; `self_s` is
    `duration_s` less the phases inside it, so the `self_s` of all phases below a path add up to its duration.
    """

    path: str
    start_s: float
    duration_s: float
    self_s: float


@dataclass(frozen=True)
class Identity:
    """Which sample this is: equal `point` means the same thing was measured, `sample` counts its repetitions."""

    point: str
    sample: int
    job: int
    label: str
    overrides: list[str]
    command: str
    sweep: str | None = None


@dataclass(frozen=True)
class ErrorReport:
    """What went wrong, for `status` other than `ok`: the exception's type and text, and the trace or last output."""

    type: str
    message: str
    trace: str = ""


@dataclass
class Result:
    """Everything known about one sample; units stand in the names of the metrics."""

    status: Status
    identity: Identity
    config: dict[str, Any]
    started_at: str
    reason: str | None = None
    effective: dict[str, Any] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    proof: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    error: ErrorReport | None = None
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return plain data in the order of the documented schema; a number that is not finite becomes None, and what
        JSON has no words for its text.
        """
        plain = _as_json(asdict(self))
        plain["status"] = self.status.value
        first = ("schema_version", "status", "reason", "identity", "config", "effective", "phases", "metrics")
        return {key: plain[key] for key in (*first, "proof", "environment", "started_at", "error")}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Result":
        """Rebuild a result; raises `LadezeitError` where the schema is another version's or a key is missing."""
        version = plain.get("schema_version") if isinstance(plain, dict) else None
        if version != SCHEMA_VERSION:
            raise LadezeitError(
                f"result has schema version {version!r}, this ladezeit reads {SCHEMA_VERSION}: "
                f"use the version that wrote it"
            )
        try:
            if not all(isinstance(plain[key], dict) for key in ("config", "effective", "metrics", "environment")):
                raise TypeError("config, effective, metrics and environment must be objects")
            error = plain["error"]
            return cls(
                status=Status(plain["status"]),
                reason=plain["reason"],
                identity=Identity(**plain["identity"]),
                config=plain["config"],
                effective=plain["effective"],
                phases=[Phase(**phase) for phase in plain["phases"]],
                metrics={k: v for k, v in plain["metrics"].items() if v is not None},
                proof=plain["proof"],
                environment=plain["environment"],
                started_at=plain["started_at"],
                error=ErrorReport(**error) if error else None,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as cause:
            raise LadezeitError(f"result does not follow schema version {SCHEMA_VERSION}: {cause!r}") from cause


@dataclass
class SweepRecord:
    """What is known about a sweep as a whole; its file ``sweep.json`` lets a job in any process find its sweep.

    `varying` are the config keys that differ between points, most significant first; `labels` the names of the samples
    by job number; `parent_run_id` and `experiment_id` are MLflow's and None where nothing is tracked.
    """

    id: str
    title: str
    command: str
    varying: list[str]
    samples_planned: int
    started_at: str
    host: str
    pid: int
    labels: list[str] = field(default_factory=list)
    git_commit: str | None = None
    experiment_id: str | None = None
    parent_run_id: str | None = None
    schema_version: int = SCHEMA_VERSION

    def save_record(self, folder: Path) -> None:
        """Write ``folder/sweep.json`` atomically."""
        write_atomically(folder / SWEEP_FILE_NAME, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read_record(cls, folder: Path) -> "SweepRecord":
        """Read ``folder/sweep.json``; raises `LadezeitError` where it cannot be read."""
        path = folder / SWEEP_FILE_NAME
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as cause:
            raise LadezeitError(f"{path} is not the record of a sweep: {cause}") from cause


def _as_json(value: Any) -> Any:
    """Return what JSON can hold of a value: an engine reports what it likes, and no measurement is lost for it."""
    if isinstance(value, dict):
        return {_as_json(key if isinstance(key, str) else str(key)): _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value).encode(errors="backslashreplace").decode()  # a lone surrogate is no text


def save_result(result: Result, folder: Path) -> Path:
    """Write `result` to ``folder/result.json`` atomically and return that path."""
    path = folder / FILE_NAME
    write_atomically(path, json.dumps(result.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    return path


def read_result(path: Path) -> Result:
    """Read a ``result.json`` (or the folder that holds one); raises `LadezeitError` where it cannot be read."""
    path = path / FILE_NAME if path.is_dir() else path
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LadezeitError(
            f"no {FILE_NAME} at {path}: the sample did not end, or this is not a sample's folder"
        ) from None
    except (OSError, ValueError) as cause:
        raise LadezeitError(f"{path} cannot be read: {cause}") from cause
    return Result.from_dict(plain)
