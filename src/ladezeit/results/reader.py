"""Samples from wherever they lie: sweep folders, single results, experiments; what cannot be read is named."""

import gc
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ladezeit.errors import LadezeitError
from ladezeit.results.fields import infer_varying_keys
from ladezeit.results.records import FILE_NAME, SWEEP_FILE_NAME, Result, SweepRecord, read_result
from ladezeit.system.gc_pause import pause_gc

_WANTED = f"the folder of a sweep (outputs/sweeps/<date>), of a run, a {FILE_NAME}, or kept results (.jsonl)"

#: The ending of a file that holds a result in each line, as results are kept for good.
KEPT = ".jsonl"

#: The job number of the discarded first sample of a sweep.
WARM_UP_JOB = -1

_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass
class Samples:
    """Results with the place each came from, and everything that is not among them, with the reason.

    `places` runs parallel to `results`: the sample's folder, or the run's address. `sweeps` are the records that were
    found. `unreadable` is damaged or foreign; `left_out` was read and is no measurement to compare;
    `missing` counts what the sweeps had planned and nobody finished. Where `with_profiled`, samples
    that a profiler looked at are taken too: they can be shown and never compared.
    """

    results: list[Result] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    sweeps: list[SweepRecord] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    missing: int = 0
    with_profiled: bool = False

    @property
    def varying(self) -> list[str]:
        """The config keys that tell the points apart: those the sweeps declare, then what else is found to differ."""
        declared = dict.fromkeys(key for record in self.sweeps for key in record.varying if key != "sample")
        return infer_varying_keys(self.results, list(declared))

    def left_out_by_reason(self) -> dict[str, list[str]]:
        """Return the places of what was left out, by the reason."""
        found: dict[str, list[str]] = {}
        for line in self.left_out:
            place, _, reason = line.rpartition(": ")
            found.setdefault(reason, []).append(place)
        return found

    def add_result(self, result: Result, place: str, seen: set[tuple[object, ...]]) -> None:
        """Take a result in, unless it is a warm-up or the same sample came from another place already."""
        key = (result.identity.sweep, result.identity.job, result.identity.point, result.started_at)
        if result.identity.job == WARM_UP_JOB:
            self.left_out.append(f"{place}: the discarded first sample of a sweep")
        elif result.config.get("profile") and not self.with_profiled:
            self.left_out.append(f"{place}: measured under a profiler")
        elif key in seen:
            self.left_out.append(f"{place}: the same sample as one already read")
        else:
            seen.add(key)
            self.results.append(result)
            self.places.append(place)


def read_paths(paths: Sequence[Path], *, with_profiled: bool = False) -> Samples:
    """Read sweep folders, folders of single runs, ``result.json`` files, and files with a result in each line.

    Raises:
        LadezeitError: a path does not exist, or no result lies at any of them.
    """
    samples = Samples(with_profiled=with_profiled)
    seen: set[tuple[object, ...]] = set()
    with pause_gc():
        for path in paths:
            _read_path(path, samples, seen)
        gc.freeze()  # what was read has no cycles, and need not be walked again and again
    samples.missing = _missing(samples)
    check_any(samples, " ".join(str(path) for path in paths))
    return samples


def _missing(samples: Samples) -> int:
    planned = sum(record.samples_planned for record in samples.sweeps)
    ids = {record.id for record in samples.sweeps}
    return max(0, planned - sum(result.identity.sweep in ids for result in samples.results))


def check_any(samples: Samples, source: str) -> None:
    """Raise `LadezeitError`, which names what was found instead, where no result was read."""
    if samples.results:
        return
    found = "".join(f"\n  {line}" for line in [*samples.unreadable, *samples.left_out][:5])
    found = f"\nfound, but not usable:{found}" if found else ""
    raise LadezeitError(f"no result to read in {source}: give {_WANTED}{found}")


def _read_path(path: Path, samples: Samples, seen: set[tuple[object, ...]]) -> None:
    if path.is_file() and path.suffix == KEPT:
        _read_lines(path, samples, seen)
        return
    if path.is_file():
        samples.add_result(read_result(path), str(path.parent), seen)
        return
    if not path.exists():
        raise LadezeitError(f"{path} does not exist: give {_WANTED}")
    gathered = gather_results(path)
    for folder, result in gathered.by_folder.items():
        samples.add_result(result, str(folder), seen)
    samples.unreadable += gathered.problems
    for own in [path] if (path / SWEEP_FILE_NAME).is_file() else sweep_folders(path):
        try:
            samples.sweeps.append(SweepRecord.read_record(own))
        except LadezeitError as cause:
            samples.unreadable.append(str(cause))


def _read_lines(path: Path, samples: Samples, seen: set[tuple[object, ...]]) -> None:
    """Read a file of kept results; a line that is none is named, and hides no other."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            samples.add_result(Result.from_dict(json.loads(line)), f"{path}:{number}", seen)
        except (LadezeitError, ValueError) as cause:
            samples.unreadable.append(f"{path}:{number}: {' '.join(str(cause).split())}")


def sweep_folders(folder: Path) -> list[Path]:
    """Return the folders of sweeps at or below `folder`, at any depth, in path order."""
    return sorted(path.parent for path in folder.rglob(SWEEP_FILE_NAME))


def newest_sweep(folder: Path) -> Path:
    """Return the folder of the sweep below `folder` that was started last, whatever its name.

    Raises:
        LadezeitError: there is no sweep whose record can be read.
    """
    started = {}
    for own in sweep_folders(folder):
        with suppress(LadezeitError, ValueError):
            moment = datetime.fromisoformat(SweepRecord.read_record(own).started_at)
            started[own] = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if not started:
        raise LadezeitError(f"no sweep in {folder}: give the folder of a sweep, a result.json, or --experiment NAME")
    return max(started, key=lambda own: started[own])


# All results below a folder, read so that one damaged file hides no other.


@dataclass
class Gathered:
    """Results by the folder of their sample, and what could not be read with the reason for it."""

    by_folder: dict[Path, Result] = field(default_factory=dict)
    unreadable: dict[Path, str] = field(default_factory=dict)

    @property
    def results(self) -> list[Result]:
        """The results in the order of their jobs."""
        return list(self.by_folder.values())

    @property
    def problems(self) -> list[str]:
        """One line for each file that could not be read."""
        return [f"{path}: {reason}" for path, reason in self.unreadable.items()]


def sample_folders(folder: Path) -> Iterator[Path]:
    """Yield every folder at or below `folder` that holds a sample's ``result.json``, in path order.

    The copies that MLflow keeps below the same outputs folder (``artifacts/<run id>/artifacts``) are no samples.
    """
    for here, folders, files in os.walk(folder):
        folders.sort()
        own = Path(here)
        copy = own.name == "artifacts" and _RUN_ID.fullmatch(own.parent.name)
        if FILE_NAME in files and not copy:
            yield own


def gather_results(folder: Path) -> Gathered:
    """Read every ``result.json`` at or below `folder`; a file that cannot be read is reported, not fatal.

    Raises:
        LadezeitError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise LadezeitError(f"{folder} is not a folder: give the folder of a sweep or of a single run")
    gathered = Gathered()
    found: list[tuple[Path, Result]] = []
    for sample in sample_folders(folder):
        try:
            found.append((sample, read_result(sample)))
        except LadezeitError as cause:
            gathered.unreadable[sample / FILE_NAME] = " ".join(str(cause).split())
    found.sort(key=lambda pair: (pair[1].identity.sweep or "", pair[1].identity.job, pair[1].started_at))
    gathered.by_folder = dict(found)
    return gathered
