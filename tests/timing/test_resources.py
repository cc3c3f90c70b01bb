"""What a load took: its peaks and not those of what was before it, and the bytes really read."""

import mmap
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ladezeit.timing.resources import GIB, ResourceMeter

MIB = 2**20


def in_a_new_process(program: str, *arguments: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [float(number) for number in done.stdout.split()]


def test_the_peak_is_that_of_the_load_and_not_of_what_was_before() -> None:
    """Imports and conversions before the load do not count as the load's memory."""
    before, during = in_a_new_process(
        """
        from ladezeit.timing.resources import ResourceMeter
        meter = ResourceMeter("cpu")
        old = bytearray(400 * 2**20)
        old[::4096] = b"x" * len(old[::4096])
        del old
        meter.mark_load_start()
        print(meter.read_metrics()["memory/host_peak_rss_gib"])
        new = bytearray(100 * 2**20)
        new[::4096] = b"x" * len(new[::4096])
        del new
        meter.mark_load_end()
        print(meter.read_metrics()["memory/host_peak_rss_gib"])
        """
    )
    if before > 0.35:
        pytest.skip("this kernel does not let the peak be reset; the record says so")
    assert 80 * MIB < (during - before) * GIB < 200 * MIB


def test_the_record_says_how_the_peak_was_got() -> None:
    """A peak that could not be reset is told apart from one that was."""
    meter = ResourceMeter("cpu")
    meter.mark_load_start()
    assert meter.sources["host_peak_rss"].startswith("VmHWM since the ")


def test_mapped_files_and_own_memory_are_told_apart(tmp_path: Path) -> None:
    """Weights that are only mapped show as file pages, copies as anonymous ones."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(64 * MIB))
    anon, file, anon_after, file_after = in_a_new_process(
        """
        import mmap, sys
        from ladezeit.timing.resources import ResourceMeter
        def show():
            metrics = ResourceMeter("cpu").read_metrics()
            print(metrics["memory/host_anon_gib"], metrics["memory/host_file_gib"])
        show()
        file = open(sys.argv[1], "rb")
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        sum(mapped[position] for position in range(0, len(mapped), 4096))
        show()
        """,
        str(path),
    )
    assert (file_after - file) * GIB > 60 * MIB
    assert (anon_after - anon) * GIB < 20 * MIB


def test_bytes_read_from_storage_are_those_of_the_load(tmp_path: Path) -> None:
    """A cold load shows its bytes, a warm one shows none: the page cache cannot be mistaken for the disk."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(32 * MIB))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    cold, warm = ResourceMeter("cpu"), ResourceMeter("cpu")
    for meter in (cold, warm):
        meter.mark_load_start()
        path.read_bytes()
        meter.mark_load_end()
    if "load/storage_read_bytes" not in cold.read_metrics():
        pytest.skip("this kernel does not tell what a process reads")
    if cold.read_metrics()["load/storage_read_bytes"] == 0:
        pytest.skip("the temporary folder lies in memory")
    assert cold.read_metrics()["load/storage_read_bytes"] >= 32 * MIB
    assert warm.read_metrics()["load/storage_read_bytes"] < MIB


def test_counters_stop_at_the_end_of_the_load() -> None:
    """Validation and inference after the load are not booked on it."""
    meter = ResourceMeter("cpu")
    assert not any(name.startswith("load/") for name in meter.read_metrics())
    meter.mark_load_start()
    meter.mark_load_end()
    first = meter.read_metrics()
    block = bytearray(64 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    again = meter.read_metrics()
    for name in ("load/minor_page_faults", "load/major_page_faults"):
        assert again[name] == first[name]
    meter.mark_load_start()
    other = mmap.mmap(-1, 16 * MIB)  # new pages for certain; the allocator might hand out old ones
    for page in range(0, len(other), mmap.PAGESIZE):
        other[page] = 1
    assert meter.read_metrics()["load/minor_page_faults"] > 0


def test_a_run_on_the_cpu_has_no_gpu_metrics() -> None:
    """No zero stands where nothing was measured."""
    meter = ResourceMeter("cpu")
    meter.mark_load_start()
    assert not any("gpu" in name for name in meter.read_metrics())


def test_metering_imports_no_torch() -> None:
    """The meter does not move the cost of importing torch into the load."""
    in_a_new_process(
        """
        import sys
        from ladezeit.timing.resources import ResourceMeter
        meter = ResourceMeter("cuda:0")
        meter.mark_load_start(); meter.mark_load_end(); meter.read_metrics()
        assert "torch" not in sys.modules
        """
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_peaks_are_those_of_the_load() -> None:
    """What the allocator held before the load is not its peak; what it held in between is."""
    before = torch.zeros(512 * MIB, dtype=torch.uint8, device="cuda:0")
    del before
    torch.cuda.empty_cache()
    meter = ResourceMeter("cuda:0")
    meter.mark_load_start()
    during = torch.zeros(128 * MIB, dtype=torch.uint8, device="cuda:0")
    del during
    meter.mark_load_end()
    metrics = meter.read_metrics()
    assert 0.125 <= metrics["memory/gpu_allocated_peak_gib"] < 0.4
    assert metrics["memory/gpu_reserved_peak_gib"] >= metrics["memory/gpu_allocated_peak_gib"]
    assert metrics["memory/gpu_used_gib"] >= 0.125


def test_the_garbage_collectors_part_of_a_load_is_told() -> None:
    """A load that the interpreter interrupts to walk over all objects says so, and no other time counts."""
    with_it, without, callbacks = in_a_new_process(
        """
        import gc, time
        from ladezeit.timing.resources import ResourceMeter
        heap = [[] for _ in range(300_000)]
        meter = ResourceMeter("cpu")
        gc.disable()
        for collects in (True, False):
            meter.mark_load_start()
            if collects:
                gc.collect()
            else:
                time.sleep(0.01)
            meter.mark_load_end()
            gc.collect()
            print(meter.read_metrics()["load/garbage_collection_share"])
        print(len(gc.callbacks))
        """
    )
    assert 0.5 < with_it <= 1.0
    assert (without, callbacks) == (0.0, 0)
