"""What comes back from the GPU machine: one archive and `gpu.json`, whole at any moment, whatever ends the run.

Both are written beside their place and renamed, the archive first: so `gpu.json` never names a file that is not in the
archive. What the running step has measured so far lies loose beside them, named after the step.
"""

import hashlib
import io
import json
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_calls import MIB

ARCHIVE, REPORT = "gpu.tar.gz", "gpu.json"
#: A file may have 16 MiB to come back.
MOST_BYTES = 16 * MIB - 64 * 1024
#: What is left out first where the archive would be larger: a report can be made again from the results.
_FIRST_LEFT_OUT = (".html", ".log", ".md")


@dataclass
class Step:
    """One step: what it took and how it ended.

    `exit_code` is None where it was left out, and `note` says why. `statuses` counts a sweep's samples, `proven` those
    that are proven, by the level of their validation. `files` are its files in the archive.
    """

    name: str
    command: list[str] = field(default_factory=list)
    seconds: float = 0.0
    exit_code: int | None = None
    note: str = ""
    failed: bool = False
    statuses: dict[str, int] = field(default_factory=dict)
    proven: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def judge(self, results: Sequence[dict[str, Any]]) -> None:
        """Take down what a sweep's results say, and whether it failed.

        Some samples may fail, as where an engine cannot run here; none may be wrong. Where all were skipped, nothing
        of it can run here, which is no failure.
        """
        self.statuses = dict(Counter(result["status"] for result in results))
        proofs = [result["proof"] for result in results if result["proof"] and result["proof"]["passed"]]
        self.proven = dict(Counter(proof["level"] for proof in proofs))
        if results and set(self.statuses) == {"skipped"}:
            self.note = self.note or f"nothing of it can run here: {results[0]['reason']}"
            return
        ended_by_us = bool(self.note)
        self.failed = "wrong" in self.statuses or not (ended_by_us or self.exit_code in (0, 1))


class Kept:
    """The folder that comes back.

    Args:
        folder: empty of earlier runs' archives, or not there yet.
        work: for the files of steps that ended, which the archive is made of.
        facts: what `gpu.json` says besides the steps, plain data.
        most_bytes: what the archive may have.

    Raises:
        FileExistsError: the folder holds an archive, which would be overwritten.
    """

    def __init__(self, folder: Path, work: Path, facts: dict[str, Any], most_bytes: int = MOST_BYTES) -> None:
        if (folder / ARCHIVE).exists():
            raise FileExistsError(f"{folder} holds an archive already: choose another --output, nothing is overwritten")
        folder.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        self.folder, self.work = folder, work
        self.steps: list[Step] = []
        self._facts, self._most_bytes = facts, most_bytes
        self._started = time.monotonic()
        self._running: str | None = None
        self._left_out: list[str] = []
        self._renew()

    def begin(self, name: str) -> None:
        """Take down that a step runs."""
        self._running = name
        _replace(self.folder / REPORT, self._report().encode())

    def end(self, step: Step) -> None:
        """Put a step's files, which are loose or in `work`, into the archive, and renew it and the report."""
        loose = self._loose(step.name)
        for path in loose:
            if not (self.work / path.name).exists():
                shutil.copy(path, self.work / path.name)
        step.files = sorted(path.name for path in self.work.iterdir() if _is_of(path, step.name))
        self.steps.append(step)
        self._running = None
        self._renew()
        for path in loose:
            path.unlink()

    def _loose(self, name: str) -> list[Path]:
        return [path for path in self.folder.iterdir() if _is_of(path, name) and path.name not in (ARCHIVE, REPORT)]

    def _renew(self) -> None:
        """Write the archive, then the report; what makes the archive too large is left out and named."""
        while True:
            report = self._report().encode()
            content = self._packed(report)
            if len(content) <= self._most_bytes or not self._leave_one_out():
                break
        _replace(self.folder / ARCHIVE, content)
        _replace(self.folder / REPORT, report)

    def _packed(self, report: bytes) -> bytes:
        written = io.BytesIO()
        with tarfile.open(fileobj=written, mode="w:gz") as packed:
            entry = tarfile.TarInfo(REPORT)
            entry.size, entry.mtime = len(report), int(time.time())
            packed.addfile(entry, io.BytesIO(report))
            for path in self._in_archive():
                packed.add(path, path.name)
        return written.getvalue()

    def _leave_one_out(self) -> bool:
        """Leave out the largest file of the kind that is missed least; return whether there was any."""
        kinds = [[path for path in self._in_archive() if path.suffix == kind] for kind in _FIRST_LEFT_OUT]
        chosen = next((paths for paths in [*kinds, self._in_archive()] if paths), None)
        if chosen is None:
            return False
        self._left_out.append(max(chosen, key=lambda path: path.stat().st_size).name)
        return True

    def _in_archive(self) -> list[Path]:
        return sorted(path for path in self.work.iterdir() if path.name not in self._left_out)

    def _report(self) -> str:
        plain = {
            **self._facts,
            "seconds": round(time.monotonic() - self._started, 1),
            "running": self._running,
            "steps": [asdict(step) for step in self.steps],
            "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self._in_archive()},
            "left_out_because_too_large": self._left_out,
        }
        return json.dumps(plain, indent=2) + "\n"


def results_of(sweep: Path) -> list[dict[str, Any]]:
    """Return the results of a sweep in the order of its jobs."""
    return [json.loads(path.read_text()) for path in _result_files(sweep)]


def lines_of(results: Sequence[dict[str, Any]]) -> bytes:
    """Return results as a file has them, a line each."""
    return "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results).encode()


class Following:
    """Takes down the results of a sweep while it runs, a line each, as they come."""

    def __init__(self, sweep: Path, target: Path) -> None:
        self._sweep, self._target = sweep, target
        self._seen: set[Path] = set()

    def look(self) -> None:
        """Append the results that are new; they were renamed to their place whole."""
        for path in _result_files(self._sweep):
            if path not in self._seen:
                self._seen.add(path)
                with self._target.open("ab", buffering=0) as file:  # at once: who is killed leaves no half line
                    file.write(lines_of([json.loads(path.read_text())]))


def _result_files(sweep: Path) -> list[Path]:
    """Return the files of all samples but the warm-up, in the order of their jobs."""
    found = [path for path in sweep.glob("*/result.json") if path.parent.name.isdigit()]
    return sorted(found, key=lambda path: int(path.parent.name))


def _is_of(path: Path, name: str) -> bool:
    return path.is_file() and path.name.startswith(f"{name}.")


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    beside.replace(path)
