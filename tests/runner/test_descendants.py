"""What a worker started is ended with its sample, and nothing else is."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ladezeit.config import ProcessConfig, ProcessKind
from ladezeit.results.records import Result, Status
from process_states import runs

Measure = Callable[..., Result]

#: The processes that `engines_for_tests.Daemons` leaves behind.
DAEMONS = ("plain", "own session", "orphan without an environment")


@pytest.fixture
def bystanders() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes of a user's own, children of this one too: one beside it, one in a session of its own."""
    started = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=own)
        for own in (False, True)
    ]
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", [ProcessKind.fresh, ProcessKind.prewarmed])
@pytest.mark.parametrize(("end", "status"), [("well", "ok"), ("crash", "failed"), ("hang", "timeout")])
def test_what_a_worker_started_ends_with_its_sample(
    measure: Measure,
    tmp_path: Path,
    bystanders: list[subprocess.Popen[bytes]],
    kind: ProcessKind,
    *,
    end: str,
    status: str,
) -> None:
    """A daemon that a library starts would share the device with all later samples; a user's own children live on."""
    (tmp_path / "end").write_text(end)
    result = measure("Daemons", process=ProcessConfig(kind, time_limit_s=20 if end == "hang" else 120))
    assert result.status is Status(status), result.reason
    started = {name: int((tmp_path / f"{name}.pid").read_text()) for name in DAEMONS}
    assert {name: runs(pid) for name, pid in started.items()} == dict.fromkeys(DAEMONS, False)
    assert all(one.poll() is None for one in bystanders)
    assert not [pid for pid in started.values() if Path(f"/proc/{pid}").exists()], "none is left as a zombie"


def test_orphans_of_others_are_adopted_only_while_a_sample_runs(measure: Measure) -> None:
    """In a user's own process nothing changes: whose parent dies becomes a child of the system, as always."""
    assert measure().status is Status.ok
    orphan = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid)"
    pid = int(subprocess.check_output([sys.executable, "-c", orphan]))
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(pid, signal.SIGKILL)
    assert parent != os.getpid()
