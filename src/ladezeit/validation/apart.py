"""Runs what a proof needs, and a sample must not pay for, in a process of its own: JSON in, JSON out."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ladezeit.config import RuntimeConfig
from ladezeit.errors import CheckpointError, LadezeitError

#: A reference load from a slow disk takes minutes; one that takes longer hangs.
LIMIT_S = 1800.0


def run_apart(module: str, request: dict[str, Any], who: str, runtime: RuntimeConfig | None = None) -> dict[str, Any]:
    """Run ``python -m module request.json output.json`` and return what it wrote.

    Args:
        module: refuses by writing ``{"refused": why}``.
        request: plain data.
        who: opens every error, ``model=…``.
        runtime: settings that must be in the environment before torch is imported.

    Raises:
        CheckpointError: it refused, failed, or took longer than `LIMIT_S`.
    """
    from ladezeit.runtime import import_environment

    with tempfile.TemporaryDirectory(prefix="ladezeit-reference-") as folder:
        asked, output = Path(folder) / "request.json", Path(folder) / "output.json"
        asked.write_text(json.dumps(request))
        environment = {**os.environ, **import_environment(runtime or RuntimeConfig())}
        try:
            ended = subprocess.run(
                [sys.executable, "-m", module, str(asked), str(output)],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            raise CheckpointError(f"{who}: its reference load was not done within {LIMIT_S:g} s") from None
        if ended.returncode != 0:
            last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
            raise CheckpointError(f"{who}: its reference load failed: {last}")
        answer = json.loads(output.read_text())
    if "refused" in answer:
        raise CheckpointError(f"{who}: {answer['refused']}")
    return dict(answer)


def answer(make: Callable[[dict[str, Any]], dict[str, Any]], arguments: list[str]) -> int:
    """Be the process that `run_apart` started: read the request, write what `make` made of it, return the exit code."""
    from ladezeit.lifetime import die_with_parent

    die_with_parent()
    try:
        made = make(json.loads(Path(arguments[0]).read_text()))
    except LadezeitError as refusal:
        made = {"refused": str(refusal)}
    Path(arguments[1]).write_text(json.dumps(made))
    return 0
