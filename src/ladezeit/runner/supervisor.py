"""Starts, watches and ends the measured process of a sample, and always comes back with a result.

While a worker runs the supervisor sleeps on its event pipe: it wakes when a phase opens, when the worker ends and when
the time limit is reached, and at no other time.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from ladezeit.config import ProcessKind, to_plain
from ladezeit.errors import WorkerError, says_out_of_memory
from ladezeit.results.records import FILE_NAME, ErrorReport, Result, Status, read_result, save_result
from ladezeit.runner.prewarm import PrewarmServer
from ladezeit.runner.rank_launcher import lost_rank
from ladezeit.runner.sample import status_of
from ladezeit.runner.spec import WorkerSpec
from ladezeit.runner.worker import STACKS_SIGNAL
from ladezeit.system.limits import kernel_kills

LOG_FILE = "worker.log"
#: Characters of a worker's log that an error report keeps, and the bytes of its end that they are looked for in.
LAST_WORDS = 4000
LOG_END_BYTES = 64 * 1024
GRACE_S = 3.0
_GPUS = "CUDA_VISIBLE_DEVICES"

Progress = Callable[[str], None]


class Worker(Protocol):
    """A started process: its pid (also its group), a descriptor that is readable when it ended, its exit code."""

    pid: int

    def fileno(self) -> int:
        """Return a descriptor that is readable once the process has ended."""
        ...

    def exit_code(self) -> int:
        """Wait for the end; return the exit code, negative for a signal."""
        ...


class FreshWorker:
    """A worker in a new interpreter; where a sample is several ranks, the process that starts them."""

    def __init__(self, command: list[str], events: int, log: int, environment: dict[str, str]) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                pass_fds=[events],
                start_new_session=True,
            )
        except OSError as cause:
            raise WorkerError(f"the measured process could not be started: {cause}") from cause
        self.pid = self._process.pid
        self._handle = os.pidfd_open(self.pid)

    def fileno(self) -> int:
        """See `Worker.fileno`."""
        return self._handle

    def exit_code(self) -> int:
        """See `Worker.exit_code`."""
        code = self._process.wait()
        os.close(self._handle)
        return code


class PrewarmedWorker:
    """A worker forked from a server that has imported everything."""

    def __init__(
        self, spec: Path, events: int, log: int, origin_ns: int, *, server: PrewarmServer, environment: dict[str, str]
    ) -> None:
        self._server = server
        self.pid = server.start_worker(spec, origin_ns, events, log, environment)

    def fileno(self) -> int:
        """See `Worker.fileno`."""
        return self._server.fileno()

    def exit_code(self) -> int:
        """See `Worker.exit_code`."""
        return self._server.wait_worker()


@dataclass(frozen=True)
class Ended:
    """How a worker came to its end: `reason` is set where the supervisor ended it."""

    exit_code: int
    reason: Status | None = None
    kernel_out_of_memory: bool = False


class Supervisor:
    """Runs samples one after another; keeps the servers that prewarmed ones are forked from.

    Use as a context manager: on leaving it the servers are ended.
    """

    def __init__(self) -> None:
        self._servers: dict[tuple[tuple[str, str], ...], PrewarmServer] = {}

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all prewarmed servers."""
        while self._servers:
            self._servers.popitem()[1].close()

    def run_sample(self, spec: WorkerSpec, progress: Progress = lambda phase: None) -> Result:
        """Measure one sample in a process of the kind its config asks for; never raises for what that process does.

        The worker writes ``result.json`` itself; where it could not, the supervisor writes what it knows. Ctrl-C ends
        the worker, leaves a result that says so, and goes on as `KeyboardInterrupt`.
        """
        spec.started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        if spec.config.process.kind is ProcessKind.inline:
            return _inline(spec, progress)
        try:
            return self._apart(spec, progress)
        except WorkerError as error:
            self.close()  # the next sample starts with a new server
            result = _result(spec, status_of(error), str(error), 0.0)
            save_result(result, spec.folder)
            return result

    def _apart(self, spec: WorkerSpec, progress: Progress) -> Result:
        """Measure in a process of its own; raises `WorkerError` where the prewarmed server fails."""
        from ladezeit.system.torch_settings import import_environment

        environment, own = import_environment(spec.config.runtime), {}
        prewarmed = spec.config.process.kind is ProcessKind.prewarmed
        if prewarmed and _GPUS in environment:
            # Told GPUs by UUID, torch asks CUDA how many there are, and CUDA, once asked, does not survive a fork.
            own[_GPUS] = environment.pop(_GPUS)
        server = self._server(spec, environment) if prewarmed else None
        if server is not None:
            spec.environment["prewarm"] = {"import_s": round(server.import_s, 3)}
        path = spec.save_spec()
        with _worker_files(spec.folder) as (events, events_write, log):
            origin_ns = time.monotonic_ns()
            worker: Worker = (
                FreshWorker(_command(spec, path, events_write, origin_ns), events_write, log, environment)
                if server is None
                else PrewarmedWorker(path, events_write, log, origin_ns, server=server, environment=own)
            )
            return _watch(worker, events, spec, origin_ns, progress)

    def _server(self, spec: WorkerSpec, environment: dict[str, str]) -> PrewarmServer:
        key = tuple(sorted(environment.items()))
        if key not in self._servers:
            self._servers[key] = PrewarmServer(environment, spec.folder / "prewarm.log")
        self._servers[key].import_libraries({"model_type": spec.checkpoint.config.get("model_type")})
        return self._servers[key]


def _command(spec: WorkerSpec, path: Path, events: int, origin_ns: int) -> list[str]:
    module = "worker" if spec.config.loading.process_count == 1 else "rank_launcher"
    return [sys.executable, "-m", f"ladezeit.runner.{module}", str(path), str(events), str(origin_ns)]


def _inline(spec: WorkerSpec, progress: Progress) -> Result:
    from ladezeit.runner.sample import Sample

    result = Sample(spec, time.monotonic_ns(), progress).run_sample()
    save_result(result, spec.folder)
    return result


def _watch(worker: Worker, events: int, spec: WorkerSpec, origin_ns: int, progress: Progress) -> Result:
    """Sleep until the worker has ended or has to be, and return its result or what is known without one."""
    killed_before = kernel_kills()
    try:
        reason = _sleep_until_end(worker, events, spec.config.process.time_limit_s, progress)
    except BaseException:
        _end(worker)
        save_result(_without_result(spec, Ended(worker.exit_code(), Status.killed), origin_ns), spec.folder)
        raise
    if reason is not None:
        _end(worker)
    ended = Ended(worker.exit_code(), reason, kernel_kills() > killed_before)
    if reason is None and (spec.folder / FILE_NAME).exists():
        return read_result(spec.folder)
    result = _without_result(spec, ended, origin_ns)
    save_result(result, spec.folder)
    return result


@contextmanager
def _worker_files(folder: Path) -> Iterator[tuple[int, int, int]]:
    """Open the event pipe (both ends) and the log; close them all afterwards."""
    events, events_write = os.pipe()
    log = os.open(folder / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        yield events, events_write, log
    finally:
        for descriptor in (events, events_write, log):
            os.close(descriptor)


def _sleep_until_end(worker: Worker, events: int, limit_s: float, progress: Progress) -> Status | None:
    """Sleep until the worker ended (None) or its time was up (`timeout`), passing on the phases it tells."""
    deadline = time.monotonic() + limit_s
    with selectors.DefaultSelector() as selector:
        selector.register(events, selectors.EVENT_READ, "event")
        selector.register(worker.fileno(), selectors.EVENT_READ, "end")
        while (left_s := deadline - time.monotonic()) > 0:
            ready = {key.data for key, _ in selector.select(left_s)}
            if "event" in ready:
                for line in os.read(events, 1 << 16).decode(errors="replace").splitlines():
                    with contextlib.suppress(ValueError, KeyError):
                        progress(json.loads(line)["phase"])
            if "end" in ready:
                return None
    return Status.timeout


def _end(worker: Worker) -> None:
    """End the worker and all it started: its stacks to the log, then a chance to leave, then the kill."""
    for number, patience_s in ((STACKS_SIGNAL, 0.2), (signal.SIGTERM, GRACE_S), (signal.SIGKILL, 0.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, number)
        with selectors.DefaultSelector() as selector:
            selector.register(worker.fileno(), selectors.EVENT_READ)
            if selector.select(patience_s) and number != STACKS_SIGNAL:
                break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)


def _without_result(spec: WorkerSpec, ended: Ended, origin_ns: int) -> Result:
    """Return what is known of a worker that left no result."""
    rank = lost_rank(spec.folder)
    who = "the worker" if rank is None else f"rank {rank}"
    status, reason = _explain(ended, spec.config.process.time_limit_s, who, last_words(spec.folder))
    return _result(spec, status, reason, (time.monotonic_ns() - origin_ns) / 1e9)


def _result(spec: WorkerSpec, status: Status, reason: str, wall_s: float) -> Result:
    return Result(
        status=status,
        identity=spec.identity,
        config=to_plain(spec.config),
        started_at=spec.started_at,
        reason=reason,
        environment=spec.environment,
        metrics={"sample/wall_s": wall_s},
        error=ErrorReport("WorkerError", reason, last_words(spec.folder)),
    )


def _explain(ended: Ended, limit_s: float, who: str, words: str) -> tuple[Status, str]:
    if ended.reason is Status.timeout:
        return (
            Status.timeout,
            f"not done after {limit_s:g} s (process.time_limit_s): ended with all it had started",
        )
    if ended.reason is Status.killed:
        return Status.killed, "interrupted"
    if ended.exit_code >= 0:
        return (
            Status.failed,
            f"{who} left with exit code {ended.exit_code} and no result; see {LOG_FILE}",
        )
    name = signal.Signals(-ended.exit_code).name
    if name == "SIGKILL" and ended.kernel_out_of_memory:
        return Status.oom, f"the kernel ended {who} because host memory ran out"
    if name == "SIGABRT" and says_out_of_memory(words):  # C++ ends the process where nobody catches std::bad_alloc
        return Status.oom, f"{who} was aborted by a library because memory ran out; see {LOG_FILE}"
    return Status.killed, f"{who} was ended by {name} from outside; see {LOG_FILE}"


def last_words(folder: Path) -> str:
    """Return the end of the worker's log; empty where there is none.

    A crash ends in one line that names all extension modules, which can be longer than the stack before it: it stays
    in the log alone.
    """
    try:
        with (folder / LOG_FILE).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_END_BYTES))
            lines = log.read().decode(errors="replace").splitlines(keepends=True)
    except OSError:
        return ""
    return "".join(line for line in lines if not line.startswith("Extension modules:"))[-LAST_WORDS:]
