"""Cold means cold and warm means warm, and where that cannot be had or known, it is said."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint_files import python
from ladezeit.config import CacheState
from ladezeit.errors import CheckpointError, NotRunnableError
from ladezeit.system.libc import count_cached_pages
from ladezeit.system.page_cache import (
    HALF_WITHIN,
    CacheReport,
    drop_pages,
    resident_bytes,
    resident_share,
    set_state,
    verify_state,
    warm_pages,
)
from ladezeit.system.residency import filesystem_type, pages_by_mincore, resident_ranges

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 20 * 2**20 + 1


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    if filesystem_type(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("temporary files lie in memory here: give pytest a --basetemp on a disk")
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(os.urandom(SIZE))
    return paths


def reach(paths: list[Path], state: CacheState) -> CacheReport:
    """Set the state until it holds: a busy system takes single pages of a warm file back now and then."""
    for _ in range(10):
        report = set_state(paths, state)
        if verify_state(paths, state)[1]:
            return report
    raise AssertionError(verify_state(paths, state))


def test_states_are_reached_and_verified(shards: list[Path]) -> None:
    """A sample that asks for a state starts in it; freshly written, still dirty files too."""
    for state, share in ((CacheState.cold, 0.0), (CacheState.warm, 1.0), (CacheState.cold, 0.0)):
        report = reach(shards, state)
        assert report.asked == state
        assert report.resident_after_share == pytest.approx(share, abs=0.01)
        assert report.seconds > 0
    assert set_state(shards, CacheState.as_is).resident_before_share == 0.0


def test_as_is_changes_nothing(shards: list[Path]) -> None:
    """``cache=as_is`` records what it finds, whatever that is."""
    reach(shards, CacheState.warm)
    drop_pages(shards[:1])
    report = set_state(shards, CacheState.as_is)
    assert report.resident_before_share == report.resident_after_share == pytest.approx(0.5, abs=0.02)
    share, as_asked, reason = verify_state(shards, CacheState.as_is)
    assert (as_asked, reason) == (True, None)
    assert share == pytest.approx(0.5, abs=0.02)


def test_a_wrong_state_is_noticed(shards: list[Path]) -> None:
    """What something read meanwhile is not cold, what was dropped meanwhile is not warm."""
    reach(shards, CacheState.warm)
    _, as_asked, reason = verify_state(shards, CacheState.cold)
    assert not as_asked
    assert re.search(r"cache=cold was asked, but (99|100)\.\d % of the checkpoint is in memory", str(reason))
    drop_pages(shards[1:])
    _, as_asked, reason = verify_state(shards, CacheState.warm)
    assert not as_asked
    assert re.search(r"cache=warm was asked, but only (49|50)\.\d %", str(reason))


def test_both_ways_of_asking_agree(shards: list[Path]) -> None:
    """cachestat and mincore count the same pages, in a file of which a part was read."""
    reach(shards, CacheState.cold)
    descriptor = os.open(shards[0], os.O_RDONLY)
    whole = [(0, SIZE)]
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(descriptor, 100 * PAGE, 7 * PAGE)
        os.pread(descriptor, 1, SIZE - 1)
        by_mincore, by_cachestat = pages_by_mincore(descriptor, whole), count_cached_pages(descriptor, whole)
        assert by_mincore is not None
        assert 90 <= by_mincore[0] <= SIZE // PAGE // 2
        assert resident_bytes(shards[0]) == pytest.approx(by_mincore[0] * PAGE, abs=10 * PAGE)
        if by_cachestat is None:
            pytest.skip("this kernel has no cachestat (Linux 6.5)")
        assert by_cachestat[0] == pytest.approx(by_mincore[0], abs=10)
    finally:
        os.close(descriptor)


def test_half_is_every_other_block(shards: list[Path]) -> None:
    """``cache=half`` is what a cache that was too small leaves, and it is looked at again like the other states."""
    reach(shards, CacheState.warm)
    report = set_state(shards, CacheState.half)
    assert report.resident_after_share == pytest.approx(0.5, abs=HALF_WITHIN)
    assert verify_state(shards, CacheState.half)[1:] == (True, None)
    with shards[0].open("rb") as file:
        begin = SIZE // 16 // PAGE * PAGE  # inside the second block, which is out
        found, _ = resident_ranges(file.fileno(), shards[0], [(0, PAGE), (begin + 2 * PAGE, begin + 4 * PAGE)])
    assert found == [True, False]
    warm_pages(shards)
    _, as_asked, reason = verify_state(shards, CacheState.half)
    assert not as_asked
    assert "cache=half was asked" in str(reason)


def test_too_little_memory_for_a_warm_cache_is_said_first(tmp_path: Path) -> None:
    """A checkpoint larger than memory cannot be warm; the sample is not started."""
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, 2**42)  # a hole: takes no space
    with pytest.raises(NotRunnableError, match=r"4096.00 GiB, and .* GiB are available"):
        set_state([huge], CacheState.warm)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A shard that vanished between two samples is an error of the checkpoint, not a crash."""
    for action in (
        resident_bytes,
        lambda path: resident_share([path]),
        lambda path: drop_pages([path]),
        lambda path: warm_pages([path]),
    ):
        with pytest.raises(CheckpointError, match="gone is missing"):
            action(tmp_path / "gone")


def test_an_empty_file_is_in_every_state(tmp_path: Path) -> None:
    """Nothing to read is neither an error nor a division by zero."""
    (tmp_path / "empty").touch()
    assert resident_share([tmp_path / "empty"]) == 1.0


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """An empty folder for a file system that the test mounts on it."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    folder = tmp_path / "mount point"
    folder.mkdir()
    yield folder
    subprocess.run(["umount", folder], check=False, capture_output=True)


def mounted(*command: object) -> None:
    if subprocess.run(["mount", *map(str, command)], check=False, capture_output=True).returncode:
        pytest.skip("this container may not mount")


def test_on_tmpfs_nothing_is_cold_and_the_reason_says_so(mount: Path) -> None:
    """A cache folder in memory cannot measure cold loads: the reason names the file system."""
    mounted("-t", "tmpfs", "none", mount)
    (mount / "a").write_bytes(b"x" * SIZE)
    set_state([mount / "a"], CacheState.cold)
    share, as_asked, reason = verify_state([mount / "a"], CacheState.cold)
    assert (share, as_asked) == (1.0, False)
    assert "tmpfs, which is memory and never cold" in str(reason)


def test_on_overlay_warm_is_not_taken_for_cold(tmp_path: Path, mount: Path) -> None:
    """Containers lie on overlayfs, where cachestat sees an empty cache whatever was read."""
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "a").write_bytes(os.urandom(SIZE))
    options = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    mounted("-t", "overlay", "overlay", "-o", options, mount)
    if filesystem_type(tmp_path) == "tmpfs":
        pytest.skip("the lower file system is memory")
    for state, other in ((CacheState.warm, CacheState.cold), (CacheState.cold, CacheState.warm)):
        reach([mount / "a"], state)
        assert not verify_state([mount / "a"], other)[1]


def test_what_the_system_does_not_tell_is_not_guessed() -> None:
    """For files of others mincore calls every page resident: that is neither a proof of warm nor a number."""
    if os.geteuid() != 0:
        pytest.skip("only root may become somebody else")
    code = """
import os, sys
from pathlib import Path
from ladezeit.system import page_cache
from ladezeit.config import CacheState
from ladezeit.system import limits
os.setgid(65534); os.setuid(65534)
shards = [Path(sys.argv[1])]
for state in CacheState:
    page_cache.set_state(shards, state)
    print(*page_cache.verify_state(shards, state))
"""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        Path(name).chmod(0o755)
        path = Path(name) / "a"
        path.write_bytes(b"x" * SIZE)
        path.chmod(0o644)
        done = python(code, path)
    cold, warm_, half_, as_is = done.stdout.splitlines() or [done.stderr]
    assert cold.startswith("nan False cache=cold was asked, but whether it is so is unknown")
    assert warm_.startswith("nan False cache=warm was asked")
    assert half_.startswith("nan False cache=half was asked")
    assert as_is == "nan True None"


def test_the_file_system_of_a_path_is_known() -> None:
    """It stands in the environment facts, and decides how the page cache is asked."""
    assert filesystem_type(Path("/proc/self/status")) == "proc"
    assert filesystem_type(Path("/sys/kernel")) == "sysfs"
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    assert filesystem_type(Path("/")) in {kind for _, place, kind, *_ in mounts if place == "/"}
