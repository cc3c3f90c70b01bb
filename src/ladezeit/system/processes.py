"""Processes: work in one of its own, JSON in, JSON out; environment variables for one call; memory given back.

What a proof needs, and a sample must not pay for, is done in a process of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ladezeit.config import RuntimeConfig
from ladezeit.errors import CheckpointError, LadezeitError, OutOfMemoryError, exit_where_memory_ends, ran_out_of_memory
from ladezeit.system.libc import trim_heap
from ladezeit.system.limits import ended_for_memory, kernel_kills

#: A reference load from a slow disk takes minutes; one that takes longer hangs.
LIMIT_S = 1800.0


def run_module_json(
    module: str, request: dict[str, Any], who: str, runtime: RuntimeConfig | None = None
) -> dict[str, Any]:
    """Run ``python -m module request.json output.json`` and return what it wrote.

    Args:
        module: refuses by writing ``{"refused": why}``.
        request: plain data.
        who: opens every error, ``model=…``.
        runtime: settings that must be in the environment before torch is imported.

    Raises:
        CheckpointError: it refused, failed, or took longer than `LIMIT_S`.
        OutOfMemoryError: memory of the device or of the host ran out there.
    """
    from ladezeit.system.torch_settings import import_environment

    with tempfile.TemporaryDirectory(prefix="ladezeit-reference-") as folder:
        asked, output = Path(folder) / "request.json", Path(folder) / "output.json"
        asked.write_text(json.dumps(request))
        environment = {**os.environ, **import_environment(runtime or RuntimeConfig())}
        kills_before = kernel_kills()
        try:
            code, said = run_module(module, [str(asked), str(output)], environment, LIMIT_S)
        except subprocess.TimeoutExpired:
            raise CheckpointError(f"{who}: its reference load was not done within {LIMIT_S:g} s") from None
        if code != 0:
            last = (said.strip().splitlines() or [f"exit code {code}"])[-1]
            if ended_for_memory(code, kills_before):
                raise OutOfMemoryError(f"{who}: memory ran out in its reference load: {last}")
            raise CheckpointError(f"{who}: its reference load failed: {last}")
        answer = json.loads(output.read_text())
    if "refused" in answer:
        raise CheckpointError(f"{who}: {answer['refused']}")
    return dict(answer)


def run_module(module: str, arguments: list[str], environment: dict[str, str], limit_s: float) -> tuple[int, str]:
    """Run ``python -m module arguments…`` to its end; return its exit code and what it said on its standard error.

    Raises:
        subprocess.TimeoutExpired: it was ended after `limit_s` seconds.
    """
    ended = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=limit_s,
    )
    return ended.returncode, ended.stderr


def answer_request(make: Callable[[dict[str, Any]], dict[str, Any]], arguments: list[str]) -> int:
    """Be the process that `run_module_json` started: read the request, write what `make` made of it, return the exit
    code.
    """
    from ladezeit.system.lifetime import die_with_parent

    die_with_parent()
    with exit_where_memory_ends():
        try:
            made = make(json.loads(Path(arguments[0]).read_text()))
        except LadezeitError as refusal:
            if ran_out_of_memory(refusal):
                raise
            made = {"refused": str(refusal)}
    Path(arguments[1]).write_text(json.dumps(made))
    return 0


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
