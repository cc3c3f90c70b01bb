"""The device lock: two sweeps never measure on one device, whatever dies."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ladezeit.system.device_lock import Holder, lock_device, lock_path
from ladezeit.system.gpus import ResolvedDevice
from ladezeit.system.nvml import Gpu

CPU = ResolvedDevice("cpu", None, None)
GPU = ResolvedDevice("cuda:0", Gpu(0, "MIG-GPU-12/1/0", "card", 0, "580", None, None), None)

HOLD = """
import sys
from pathlib import Path
from ladezeit.system.device_lock import lock_device
from ladezeit.system.gpus import ResolvedDevice
with lock_device(ResolvedDevice("cpu", None, None), lambda holder: print("waiting", flush=True), Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def other_process(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_whoever_waits_is_told_for_whom(tmp_path: Path) -> None:
    """The user sees which process has the device, once, and goes on when it ends."""
    told: list[Holder | None] = []
    with other_process(tmp_path) as other:
        assert line_of(other) == "held"

        def waiting(holder: Holder | None) -> None:
            told.append(holder)
            assert other.stdin is not None
            other.stdin.close()

        with lock_device(CPU, waiting, tmp_path):
            assert other.wait(10) == 0
    assert [holder and holder.pid for holder in told] == [other.pid]
    assert told[0] is not None
    assert str(tmp_path) in told[0].command


def test_a_second_process_waits_until_the_first_lets_go(tmp_path: Path) -> None:
    """Two sweeps started at once run one after the other."""
    with lock_device(CPU, folder=tmp_path):
        other = other_process(tmp_path)
        assert line_of(other) == "waiting"
    assert line_of(other) == "held"
    other.communicate("\n")
    assert other.returncode == 0


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    """A crash or a kill -9 leaves no lock behind that somebody has to delete."""
    with other_process(tmp_path) as other:
        assert line_of(other) == "held"
        os.kill(other.pid, signal.SIGKILL)
        other.wait(10)
    told: list[Holder | None] = []
    with lock_device(CPU, told.append, tmp_path):
        assert json.loads(lock_path(CPU, tmp_path).read_text())["pid"] == os.getpid()
    assert told == []


def test_one_process_may_enter_again(tmp_path: Path) -> None:
    """A sweep that holds the device does not wait for its own samples; the last one out lets go."""
    outer = lock_device(CPU, folder=tmp_path)
    inner = lock_device(CPU, folder=tmp_path)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    other = other_process(tmp_path)
    assert line_of(other) == "waiting"
    inner.__exit__(None, None, None)
    assert line_of(other) == "held"
    other.communicate("\n")


def test_an_error_or_an_interrupt_lets_go(tmp_path: Path) -> None:
    """Ctrl-C in a sweep does not block the next one."""
    with pytest.raises(KeyboardInterrupt), lock_device(CPU, folder=tmp_path):
        raise KeyboardInterrupt
    other = other_process(tmp_path)
    assert line_of(other) == "held"
    other.communicate("\n")


def test_each_device_has_a_lock_of_its_own(tmp_path: Path) -> None:
    """A sweep on the CPU does not keep one on the GPU waiting, and a MIG id makes a file name."""
    with lock_device(CPU, folder=tmp_path), lock_device(GPU, folder=tmp_path):
        names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 2
    assert "gpu-MIG-GPU-12_1_0.samples.lock" in names


def test_locks_lie_in_ladezeits_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sweeps of a user meet at the same file, wherever they were started."""
    monkeypatch.setenv("LADEZEIT_CACHE", str(tmp_path))
    assert lock_path(GPU).parent == tmp_path / "locks"


def test_threads_of_one_process_share_the_lock(tmp_path: Path) -> None:
    """Threads count as one holder: none of them waits for its own process."""
    entered = threading.Barrier(4, timeout=10)

    def enter() -> None:
        with lock_device(CPU, folder=tmp_path):
            entered.wait()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not entered.broken
    with lock_device(CPU, lambda holder: pytest.fail(f"still held by {holder}"), tmp_path):
        pass


def test_every_user_of_the_machine_may_wait_for_the_device(tmp_path: Path) -> None:
    """Whoever shares the cache folder can take the lock next, whatever the first one's umask is."""
    with lock_device(CPU, folder=tmp_path):
        pass
    assert lock_path(CPU, tmp_path).stat().st_mode & 0o777 == 0o666
