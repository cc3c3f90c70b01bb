"""Starts, watches and ends the measured process of a sample, and always comes back with a result.

While a worker runs the supervisor sleeps on its event pipe: it wakes when a phase opens, when the worker ends, when the
time limit is reached, and once a second to see how long the worker's log has become.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from ladezeit.config import ProcessKind, to_plain
from ladezeit.errors import MEMORY_FULL, LadezeitError, WorkerError, says_out_of_memory
from ladezeit.results.records import FILE_NAME, ErrorReport, Result, Status, read_result, save_result
from ladezeit.runner.prewarm import NoAnswerError, PrewarmServer
from ladezeit.runner.rank_launcher import lost_rank
from ladezeit.runner.sample import status_of
from ladezeit.runner.spec import WorkerSpec
from ladezeit.runner.worker import STACKS_SIGNAL
from ladezeit.system.lifetime import end_descendants, signal_name
from ladezeit.system.limits import kernel_kills

LOG_FILE = "worker.log"
#: Characters of a worker's log that an error report keeps, and the bytes of its end that they are looked for in.
LAST_WORDS = 4000
LOG_END_BYTES = 64 * 1024
#: How long a worker's log may become, and how often that is looked at.
MOST_LOG_BYTES = 16 * 2**20
LOG_CHECK_S = 1.0
#: A worker's result that nobody can read is kept under this name.
UNREADABLE_FILE = "result.unreadable.json"
#: Signals that a process causes by what it does itself. Whoever sends one from outside means the same: a crash.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP}
GRACE_S = 3.0
_GPUS = "CUDA_VISIBLE_DEVICES"

Progress = Callable[[str], None]


class Worker:
    """A started process: `pid` is also its process group and its session; its descriptor is readable when it ended."""

    def __init__(self, pid: int, wait: Callable[[], int]) -> None:
        self.pid = pid
        self._wait = wait
        self._handle = os.pidfd_open(pid)

    def fileno(self) -> int:
        """Return a descriptor that is readable once the process has ended."""
        return self._handle

    def exit_code(self) -> int:
        """Wait for the end; return the exit code, negative for a signal.

        Raises:
            NoAnswerError: it does not end although it was killed, or its server does not answer.
            WorkerError: its server has ended.
        """
        try:
            return self._wait()
        finally:
            os.close(self._handle)


def start_fresh(command: list[str], events: int, log: int, environment: dict[str, str]) -> Worker:
    """Start a worker in a new interpreter; where a sample is several ranks, the process that starts them.

    Raises:
        WorkerError: the system has no process, no memory or no program for it.
    """
    try:
        process = subprocess.Popen(
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

    def wait() -> int:
        try:
            return process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            raise NoAnswerError(f"the measured process {process.pid} was killed and does not end") from None

    return Worker(process.pid, wait)


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
        """Measure one sample in a process of the kind its config asks for; never raises for what becomes of it.

        The worker writes ``result.json`` itself; where it could not, the supervisor writes what it knows, and where
        that cannot be written either, the result is still returned. All that the worker started has ended then. Ctrl-C
        ends the worker, leaves a result that says so, and goes on as `KeyboardInterrupt`.
        """
        spec.started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            if spec.config.process.kind is ProcessKind.inline:
                return _save(_inline(spec, progress), spec.folder)
            return self._apart(spec, progress)
        except Exception as error:
            self.close()  # the next sample starts with a new server
            return _own_result(spec) or _save(_failed(spec, error), spec.folder)

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
        with end_descendants(), _worker_files(spec.folder) as (events, events_write, log):
            origin_ns = time.monotonic_ns()
            if server is None:
                worker = start_fresh(_command(spec, path, events_write, origin_ns), events_write, log, environment)
            else:
                pid = server.start_worker(path, origin_ns, events_write, log, own)
                worker = Worker(pid, partial(server.wait_worker, pid))
            return _watch(worker, events, spec, origin_ns, progress)

    def _server(self, spec: WorkerSpec, environment: dict[str, str]) -> PrewarmServer:
        key = tuple(sorted(environment.items()))
        if key not in self._servers:
            self._servers[key] = PrewarmServer(environment, spec.folder / "prewarm.log")
        self._servers[key].import_libraries(
            {"model_type": spec.checkpoint.config.get("model_type")}, spec.config.process.time_limit_s
        )
        return self._servers[key]


def _command(spec: WorkerSpec, path: Path, events: int, origin_ns: int) -> list[str]:
    module = "worker" if spec.config.loading.process_count == 1 else "rank_launcher"
    return [sys.executable, "-m", f"ladezeit.runner.{module}", str(path), str(events), str(origin_ns)]


def _inline(spec: WorkerSpec, progress: Progress) -> Result:
    from ladezeit.runner.sample import Sample

    return Sample(spec, time.monotonic_ns(), progress).run_sample()


def _watch(worker: Worker, events: int, spec: WorkerSpec, origin_ns: int, progress: Progress) -> Result:
    """Sleep until the worker has ended or has to be, and return its result or what is known without one."""
    killed_before = kernel_kills()
    try:
        reason = _sleep_until_end(worker, events, spec, progress)
    except BaseException:
        _end(worker)
        _save(_without_result(spec, Ended(0, Status.killed), origin_ns), spec.folder)
        raise
    if reason is not None:
        _end(worker)
    ended = Ended(worker.exit_code(), reason, kernel_kills() > killed_before)
    own = _own_result(spec) if reason is None else None
    return own or _save(_without_result(spec, ended, origin_ns), spec.folder)


def _own_result(spec: WorkerSpec) -> Result | None:
    """Return what the worker wrote; None where it did not come to that, or nobody can read it."""
    path = spec.folder / FILE_NAME
    if not path.exists():
        return None
    try:
        result = read_result(path)
    except LadezeitError:
        path.replace(spec.folder / UNREADABLE_FILE)
        return None
    return result if result.started_at == spec.started_at else None


def _save(result: Result, folder: Path) -> Result:
    """Write and return `result`; where its folder is gone it is made again, and a full disk costs the file alone."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        save_result(result, folder)
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


def _sleep_until_end(worker: Worker, events: int, spec: WorkerSpec, progress: Progress) -> Status | None:
    """Sleep until the worker ended (None) or its time was up (`timeout`), passing on the phases it tells."""
    deadline = time.monotonic() + spec.config.process.time_limit_s
    with selectors.DefaultSelector() as selector:
        selector.register(events, selectors.EVENT_READ, "event")
        selector.register(worker.fileno(), selectors.EVENT_READ, "end")
        while (left_s := deadline - time.monotonic()) > 0:
            ready = {key.data for key, _ in selector.select(min(left_s, LOG_CHECK_S))}
            if "event" in ready:
                for line in os.read(events, 1 << 16).decode(errors="replace").splitlines():
                    with contextlib.suppress(ValueError, KeyError):
                        progress(json.loads(line)["phase"])
            shorten_log(spec.folder / LOG_FILE)
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
    status, reason = _explain(ended, spec, who)
    return _result(spec, status, reason, (time.monotonic_ns() - origin_ns) / 1e9)


def _failed(spec: WorkerSpec, error: Exception) -> Result:
    """Return the result of a sample that broke outside of its worker."""
    status = Status.timeout if isinstance(error, NoAnswerError) else status_of(error)
    if isinstance(error, LadezeitError):
        return _result(spec, status, str(error), 0.0)
    words = "".join(traceback.format_exception(error))
    return _result(spec, status, f"{type(error).__name__}: {error}", 0.0, words)


def _result(spec: WorkerSpec, status: Status, reason: str, wall_s: float, words: str = "") -> Result:
    return Result(
        status=status,
        identity=spec.identity,
        config=to_plain(spec.config),
        started_at=spec.started_at,
        reason=reason,
        environment=spec.environment,
        metrics={"sample/wall_s": wall_s},
        error=ErrorReport("WorkerError", reason, words or last_words(spec.folder)),
    )


def _explain(ended: Ended, spec: WorkerSpec, who: str) -> tuple[Status, str]:
    limit_s, code = spec.config.process.time_limit_s, ended.exit_code
    if ended.reason is Status.timeout:
        return (
            Status.timeout,
            f"not done after {limit_s:g} s (process.time_limit_s): ended with all it had started",
        )
    if ended.reason is Status.killed:
        return Status.killed, "interrupted"
    if (spec.folder / UNREADABLE_FILE).exists():
        return Status.failed, f"{who} left a result that cannot be read: see {UNREADABLE_FILE}"
    if code < 0:
        return _explain_signal(ended, who, spec.folder)
    if code == MEMORY_FULL:
        return Status.oom, f"{who} ended because host memory ran out; see {LOG_FILE}"
    return Status.failed, f"{who} left with exit code {code} and no result; see {LOG_FILE}"


def _explain_signal(ended: Ended, who: str, folder: Path) -> tuple[Status, str]:
    number, name = -ended.exit_code, signal_name(-ended.exit_code)
    if number == signal.SIGKILL and ended.kernel_out_of_memory:
        return Status.oom, f"the kernel ended {who} because host memory ran out"
    if number == signal.SIGABRT and says_out_of_memory(last_words(folder)):
        # C++ ends the process where nobody catches std::bad_alloc
        return Status.oom, f"{who} was aborted by a library because memory ran out; see {LOG_FILE}"
    if number in CRASHES:
        return Status.failed, f"{who} crashed with {name}; see {LOG_FILE}"
    return Status.killed, f"{who} was ended by {name} from outside; see {LOG_FILE}"


# The worker's log, which a library may fill faster than a disk holds it.


def shorten_log(path: Path) -> None:
    """Cut the middle out of a log that is longer than `MOST_LOG_BYTES`, while it is written to.

    Beginning and end stay. What is written in the very moment may be lost with the middle.
    """
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        if size <= MOST_LOG_BYTES:
            return
        kept = MOST_LOG_BYTES // 4
        with path.open("r+b") as log:
            log.seek(size - kept)
            end = log.read()[-kept:]  # to its end as it is by now, and not as it was when it was measured
            log.truncate(kept)
        with path.open("ab") as log:
            log.write(f"\n… {size - 2 * kept} bytes left out: a log keeps {MOST_LOG_BYTES} …\n".encode() + end)


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
