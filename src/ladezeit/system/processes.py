"""Processes: work in one of its own, JSON in, JSON out; environment variables for one call; memory given back.

What a verification needs, and a sample must not pay for, is done in a process of its own.
"""

import errno
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ladezeit.config import RuntimeConfig
from ladezeit.errors import (
    CheckpointError,
    LadezeitError,
    OutOfMemoryError,
    exit_where_memory_ends,
    ran_out_of_memory,
    shorten_value,
)
from ladezeit.system.libc import trim_heap
from ladezeit.system.lifetime import die_with_parent
from ladezeit.system.limits import ended_for_memory, kernel_kills

#: Exit code of a process that found the disk full.
_DISK_FULL = errno.ENOSPC
#: Where `report_progress` writes to, in a process that `run_module_json` started.
_progress_lines: TextIO | None = None


def run_module_json(
    module: str,
    request: dict[str, Any],
    who: str,
    what: str,
    *,
    limit_s: float | None = None,
    runtime: RuntimeConfig | None = None,
    variables: Mapping[str, str] | None = None,
    error: type[LadezeitError] = CheckpointError,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Run ``python -m module request.json answer.json``, which calls `answer_request`, and return what it wrote.

    Args:
        module: answers, or refuses by raising a `LadezeitError`.
        request: plain data.
        who: opens every error, ``model=…``.
        what: is done, as a noun.
        limit_s: after how many seconds it is ended; None for a process that takes as long as its files are large.
        runtime: settings that must be in the environment before torch is imported.
        variables: of its environment, besides.
        error: raised where it refused, failed, or took longer than `limit_s`.
        on_progress: called with each number that the module gives to `report_progress`.

    Raises:
        OutOfMemoryError: memory of the device or of the host ran out there.
        OSError: the disk was full there.
    """
    from ladezeit.system.torch_settings import import_environment

    environment = {**os.environ, **import_environment(runtime or RuntimeConfig()), **(variables or {})}
    with tempfile.TemporaryDirectory(prefix="ladezeit-") as folder:
        asked, output = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request))
        kills_before = kernel_kills()
        try:
            code, said = run_module(module, [str(asked), str(output)], environment, limit_s, on_progress)
        except subprocess.TimeoutExpired:
            raise error(f"{who}: {what} took longer than {limit_s:g} s") from None
        if code == _DISK_FULL:
            raise OSError(_DISK_FULL, os.strerror(_DISK_FULL), what)
        if code != 0:
            last = shorten_value((said.strip().splitlines() or [f"exit code {code}"])[-1], 400)
            if ended_for_memory(code, kills_before):
                raise OutOfMemoryError(f"{who}: memory ran out in {what}: {last}")
            raise error(f"{who}: {what} failed: {last}")
        answer = json.loads(output.read_text())
    if "refused" in answer:
        raise error(f"{who}: {answer['refused']}")
    return dict(answer)


def run_module(
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    limit_s: float | None,
    on_progress: Callable[[int], None],
) -> tuple[int, str]:
    """Run ``python -m module arguments…`` to its end; return its exit code and what it said on its standard error.

    Raises:
        subprocess.TimeoutExpired: it was ended after `limit_s` seconds.
    """
    command = [sys.executable, "-P", "-m", module, *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, env=environment, stderr=errors, **pipes) as child,
    ):
        assert child.stdout is not None
        started, clock = time.monotonic(), threading.Timer(limit_s or 0, child.kill)
        if limit_s is not None:
            clock.start()
        try:
            for line in child.stdout:
                on_progress(int(line))
            code = child.wait()
        finally:
            clock.cancel()
            child.kill()  # after an error of `on_progress` or Ctrl-C; one that has ended is left alone
        if limit_s is not None and code < 0 and time.monotonic() - started >= limit_s:
            raise subprocess.TimeoutExpired(command, limit_s)
        errors.seek(0)
        return code, errors.read().decode(errors="replace")


def answer_request(make: Callable[[dict[str, Any]], dict[str, Any]], arguments: list[str]) -> int:
    """Be the process that `run_module_json` started: read the request, write what `make` made of it, return the exit
    code.
    """
    global _progress_lines

    die_with_parent()
    # Libraries may print; the lines are ours alone.
    _progress_lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with exit_where_memory_ends():
        try:
            made = make(json.loads(Path(arguments[0]).read_text()))
        except LadezeitError as refusal:
            if ran_out_of_memory(refusal):
                raise
            made = {"refused": str(refusal)}
        except OSError as cause:
            if cause.errno == errno.ENOSPC:
                return _DISK_FULL
            raise
    Path(arguments[1]).write_text(json.dumps(made))
    return 0


def report_progress(done: int) -> None:
    """Tell who waits in `run_module_json` how far this process is; in any other process, tell nobody."""
    if _progress_lines is not None:
        print(done, file=_progress_lines, flush=True)


# Environment variables for one call: some libraries take arguments in no other way.


@contextmanager
def set_variables(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set `values` while the block runs, and put back what was there, whatever happens.

    None sets nothing; what the block makes of that variable is put back too.
    """
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def trim_allocators() -> None:
    """Have the allocators return to the machine what they keep for later: torch's on the GPUs, the C library's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim_heap()
