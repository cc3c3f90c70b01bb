"""MLflow's web interface on a database, on this machine alone, for as long as somebody looks at it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from ladezeit.errors import TrackingError
from ladezeit.redaction import redact_text

HOST = "127.0.0.1"

#: MLflow's command line, in a process that does not outlive the one that started it.
_PROGRAM = "from ladezeit.system.lifetime import die_with_parent; die_with_parent(); from mlflow.cli import cli; cli()"

_START_LIMIT_S = 120.0
_END_LIMIT_S = 5.0
_POLL_S = 0.1
_MOST_LOG = 600

#: The job runner would start processes of its own, for things that are no comparison.
_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@contextmanager
def serve_ui(uri: str, port: int) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Serve the store at `uri` while the block runs; yields its address, which answers, and the process.

    Another port is taken where somebody listens on `port`. When the block ends, so do all processes that were started.

    Raises:
        TrackingError: the interface ended, or did not answer in time; the text holds its last words.
    """
    address = f"http://{HOST}:{port if _is_free(port) else _any_port()}"
    with tempfile.TemporaryFile() as log:
        process = _start(uri, address, log.fileno())
        try:
            _wait(process, address, log.fileno())
            yield address, process
        finally:
            _end(process)


def _start(uri: str, address: str, log: int) -> "subprocess.Popen[bytes]":
    arguments = ["ui", "--host", HOST, "--port", address.rpartition(":")[2], "--workers", "1"]
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments],
        # The address of a database may hold a password: an argument would show it to everybody on the machine.
        env={**os.environ, **_ENVIRONMENT, "MLFLOW_BACKEND_STORE_URI": uri},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the whole group
    )


def _wait(process: "subprocess.Popen[bytes]", address: str, log: int) -> None:
    ask = build_opener(ProxyHandler({}))  # no proxy leads to this machine
    deadline = time.monotonic() + _START_LIMIT_S
    while True:
        try:
            with ask.open(f"{address}/health", timeout=2):
                return
        except (URLError, OSError):
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            said = os.pread(log, 1_000_000, 0).decode(errors="replace").strip()
            raise TrackingError(f"MLflow's interface did not start at {address}: {redact_text(said)[-_MOST_LOG:]}")
        time.sleep(_POLL_S)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and all that it started, first asking, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + _END_LIMIT_S
        while _group_lives(process) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    process.wait()


def _group_lives(process: "subprocess.Popen[bytes]") -> bool:
    process.poll()  # one that has ended counts until it is waited for
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _any_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
