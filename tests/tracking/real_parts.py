"""Servers that tests start, use and end: MLflow, and whatever else takes a while until it is ready."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PASSWORD = "geh3im-wort"
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str] | str, ready: Callable[[], bool], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends, once it is ready; it and all it started are ended by their process group."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            shell=isinstance(command, str),
            stdout=output,
            stderr=output,
            env={**os.environ, **QUIET},
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that `running` started, with its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def answers(address: str) -> bool:
    """Whether an HTTP server says that it is well."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@contextmanager
def mlflow_server(folder: Path, backend: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Serve the store `backend` with artifacts in `folder`; yields the address and the process."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--workers", "1", "--artifacts-destination", (folder / "served").as_uri()]
    with running(command, lambda: answers(address), folder / "server.log") as process:
        yield address, process
