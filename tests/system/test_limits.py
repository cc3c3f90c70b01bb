"""Limits of containers are seen, in both versions of control groups: a too large load is refused, not killed."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from ladezeit.errors import MEMORY_FULL
from ladezeit.system.limits import (
    available_cpus,
    available_memory_bytes,
    ended_for_memory,
    kernel_kills,
    memory_limit_bytes,
    near_cpus,
)

GIB = 2**30
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def machine(root: Path, cgroup: str, files: dict[str, object]) -> Path:
    """Write the files that a kernel shows."""
    for name, content in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_without_limits_the_machine_counts(tmp_path: Path) -> None:
    """On a plain machine, or where nothing can be read, the machine's own numbers hold."""
    unlimited = machine(tmp_path, "0::/a\n", {f"{V2}/a/memory.max": "max", f"{V2}/a/cpu.max": "max 100000"})
    for root in (unlimited, tmp_path / "nothing"):
        assert memory_limit_bytes(root) == psutil.virtual_memory().total
        assert available_memory_bytes(root) > 0
        assert available_cpus(root) == len(os.sched_getaffinity(0))


def test_version_2_is_read_up_to_the_root(tmp_path: Path) -> None:
    """A limit of a group above counts too; page cache that can be given back is free memory."""
    files = {
        f"{V2}/pod/box/memory.max": "max",
        f"{V2}/pod/box/memory.current": GIB // 4,
        f"{V2}/pod/memory.max": GIB,
        f"{V2}/pod/memory.current": GIB // 2,
        f"{V2}/pod/memory.stat": f"anon 1\nactive_file 1000\ninactive_file 200\nslab_reclaimable 34\nfile {GIB}",
        f"{V2}/pod/cpu.max": "50000 100000",
    }
    root = machine(tmp_path, "0::/pod/box\n", files)
    assert memory_limit_bytes(root) == GIB
    assert available_memory_bytes(root) == GIB // 2 + 1234
    assert available_cpus(root) == 1


def test_version_1_is_read(tmp_path: Path) -> None:
    """Older machines name the same things otherwise, and write no limit as a very large one."""
    files = {
        f"{V1}/box/memory.limit_in_bytes": GIB,
        f"{V1}/box/memory.usage_in_bytes": GIB // 4,
        f"{V1}/box/memory.stat": "total_active_file 100\ntotal_inactive_file 20\ntotal_rss 5",
        f"{V1}/memory.limit_in_bytes": 9223372036854771712,
        f"{V1}/memory.usage_in_bytes": 9 * GIB,
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": 100_000,
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": 100_000,
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": -1,
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 100_000,
    }
    root = machine(tmp_path, "5:memory:/box\n4:cpu,cpuacct:/box\n0::/\n", files)
    assert memory_limit_bytes(root) == GIB
    assert available_memory_bytes(root) == GIB * 3 // 4 + 120
    assert available_cpus(root) == 1


def test_a_path_of_the_host_leads_to_the_containers_own_root(tmp_path: Path) -> None:
    """In a container without its own name space the path is the host's and does not exist; the limit is at the root."""
    root = machine(tmp_path, "0::/docker/0123\n", {f"{V2}/memory.max": GIB, f"{V2}/memory.current": 2 * GIB})
    assert memory_limit_bytes(root) == GIB
    assert available_memory_bytes(root) == 0


def test_this_machine_has_some_of_everything() -> None:
    """Read for real, the numbers fit together."""
    assert 0 < available_memory_bytes() <= memory_limit_bytes() <= psutil.virtual_memory().total
    assert 1 <= available_cpus() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("content", ["", "garbage", "1:memory", "::::"])
def test_nonsense_is_not_fatal(tmp_path: Path, content: str) -> None:
    """A kernel that shows something else does not stop a measurement."""
    assert memory_limit_bytes(machine(tmp_path, content, {})) == psutil.virtual_memory().total


NEAR = "sys/bus/pci/devices/0000:3b:00.0/local_cpulist"


@pytest.mark.parametrize(
    ("ours", "listed", "near"),
    [
        (range(64), "0-15,32-47", {*range(16), *range(32, 48)}),  # two sockets
        (range(64), "0-63", set()),  # one
        (range(8, 40), "0-15,32-47", {*range(8, 16), *range(32, 40)}),  # a container of both
        (range(64), "3,60-61", set()),  # too few to be worth it
        (range(4), "0-1", {0, 1}),
        (range(16, 32), "0-15", set()),  # a container of the other side
        (range(4), "", set()),
        (range(4), "many", set()),
    ],
)
def test_readers_for_a_gpu_stay_on_its_side(
    ours: range, listed: str, near: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine of two halves bytes do not cross it twice; where that is not known, or costs more, all are used."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(ours))
    root = machine(tmp_path, "0::/a\n", {NEAR: listed})
    assert near_cpus("0000:3b:00.0", root) == near
    assert near_cpus("0000:5e:00.0", root) == near_cpus(None, root) == set()


def test_a_process_that_the_kernel_ended_for_memory_is_told_from_one_that_somebody_killed(tmp_path: Path) -> None:
    """Both end by SIGKILL: the kernel counts those that it ended itself, those of other containers apart from ours."""
    vmstat = "nr_free_pages 1234\noom_kill 3\npgfault 99"
    assert kernel_kills(machine(tmp_path, "0::/", {"proc/vmstat": vmstat})) == 3
    assert kernel_kills(tmp_path / "nothing") == 0
    groups = {f"{V2}/pod/box/memory.events": "low 0\noom 2\noom_kill 1", f"{V2}/pod/memory.events": "oom_kill 2"}
    assert kernel_kills(machine(tmp_path / "2", "0::/pod/box", {"proc/vmstat": vmstat, **groups})) == 1
    older = {f"{V1}/box/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2"}
    assert kernel_kills(machine(tmp_path / "1", "5:memory:/box", {"proc/vmstat": vmstat, **older})) == 2
    now = kernel_kills()
    assert ended_for_memory(-signal.SIGKILL, now - 1)
    assert not ended_for_memory(-signal.SIGKILL, now)
    assert not ended_for_memory(-signal.SIGSEGV, now - 1)
    assert ended_for_memory(MEMORY_FULL, now)
    assert not ended_for_memory(1, now)
