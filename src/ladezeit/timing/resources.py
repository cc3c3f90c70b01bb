"""What a load took from the machine: memory peaks, page faults, bytes read from storage, the garbage collector's time.

Everything is read from counters that the kernel, the driver and torch keep anyway, at the borders of the load; only the
garbage collector is timed while the clock runs, at the two ends of each collection.
"""

import gc
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class _Counters:
    """Counts since this process started; `read_bytes` is None where the kernel keeps or shows none."""

    major_faults: int
    minor_faults: int
    read_bytes: int | None
    time_s: float


#: Of what an engine was found to have done: the bytes that it took of the GPU itself, where torch does not see them.
GPU_BYTES_BESIDE_TORCH = "gpu_bytes_beside_torch"


class ResourceMeter:
    """Meters this process (all its threads, not its children) and the GPU where `device` is one.

    Use: `mark_load_start`, the load, `mark_load_end`, then `read` as often as wished. Peaks go on until the last
    `read`; counters named ``load/...`` stop at `mark_load_end`. `sources` says how what may come from several places
    was got, for the record of what was effective. `gpu_beside_torch_bytes` is what an engine took of the GPU itself
    while it loaded, which no library's counters know: it is added to the peaks.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.sources: dict[str, str] = {}
        self.gpu_beside_torch_bytes = 0
        self._start: _Counters | None = None
        self._end: _Counters | None = None
        self._collecting_since_s = 0.0
        self._collected_s = 0.0

    def mark_load_start(self) -> None:
        """Reset the peaks, as far as the kernel lets us, and start the counters."""
        reset = _reset_host_peak()
        self.sources["host_peak_rss"] = "VmHWM since the load's start" if reset else "VmHWM since the process's start"
        torch = self._torch()
        if torch is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._end = None
        self._collected_s = 0.0
        gc.callbacks.append(self._collection)
        self._start = _counters()

    def mark_load_end(self) -> None:
        """Stop the counters of the load."""
        self._end = _counters()
        gc.callbacks.remove(self._collection)

    def read_metrics(self) -> dict[str, float]:
        """Return the metrics, in GiB, bytes or counts as they are named; what cannot be had here is left out."""
        return self._host() | self._gpu() | self._load()

    def _host(self) -> dict[str, float]:
        status = _status_bytes()
        if "VmHWM" in status:
            peak = status["VmHWM"]
        else:
            self.sources["host_peak_rss"] = "getrusage since the process's start"
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        metrics = {"memory/host_peak_rss_gib": peak / GIB}
        if "RssAnon" in status:
            metrics["memory/host_anon_gib"] = status["RssAnon"] / GIB
            metrics["memory/host_file_gib"] = status["RssFile"] / GIB
        return metrics

    def _gpu(self) -> dict[str, float]:
        torch = self._torch()
        if torch is None:
            return {}
        free, total = torch.cuda.mem_get_info(self.device)
        every = range(torch.cuda.device_count())  # a GPU that this process does not use has 0
        beside = self.gpu_beside_torch_bytes
        if beside:
            self.sources["gpu_peaks"] = f"torch's allocator, and {beside} bytes that the engine took itself"
        return {
            "memory/gpu_allocated_peak_gib": (beside + sum(map(torch.cuda.max_memory_allocated, every))) / GIB,
            "memory/gpu_reserved_peak_gib": (beside + sum(map(torch.cuda.max_memory_reserved, every))) / GIB,
            "memory/gpu_used_gib": (total - free) / GIB,
        }

    def _load(self) -> dict[str, float]:
        if self._start is None:
            return {}
        end = self._end or _counters()
        metrics = {
            "load/major_page_faults": float(end.major_faults - self._start.major_faults),
            "load/minor_page_faults": float(end.minor_faults - self._start.minor_faults),
        }
        if end.read_bytes is not None and self._start.read_bytes is not None:
            metrics["load/storage_read_bytes"] = float(end.read_bytes - self._start.read_bytes)
        metrics["load/garbage_collection_share"] = self._collected_s / max(end.time_s - self._start.time_s, 1e-9)
        return metrics

    def _collection(self, border: str, _: dict[str, int]) -> None:
        """Be told by the interpreter that a collection starts or stops; there is one at a time in a process."""
        now = time.monotonic()
        if border == "start":
            self._collecting_since_s = now
        else:
            self._collected_s += now - self._collecting_since_s

    def _torch(self) -> Any:
        """Return torch where it has a context on the GPU; importing it or opening one would be a phase of its own."""
        torch = sys.modules.get("torch")
        used = self.device.startswith("cuda") and torch is not None and torch.cuda.is_initialized()
        return torch if used else None


def synchronize_gpus() -> None:
    """Wait until every GPU that this process has memory on has done what it was given; opens no context elsewhere."""
    import torch

    for index in range(torch.cuda.device_count()):
        if torch.cuda.memory_reserved(index):
            torch.cuda.synchronize(index)


def _reset_host_peak() -> bool:
    try:
        # 5 resets the high-water mark alone (proc_pid_clear_refs(5)).
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes() -> dict[str, int]:
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if line.endswith(" kB"))
    return {key: int(value.split()[0]) * 1024 for key, _, value in pairs}


def _counters() -> _Counters:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return _Counters(usage.ru_majflt, usage.ru_minflt, _storage_read_bytes(), time.monotonic())


def _storage_read_bytes() -> int | None:
    try:
        lines = (_PROCESS / "io").read_text().splitlines()
    except OSError:
        return None
    counts = dict(line.split(": ") for line in lines)
    return int(counts["read_bytes"]) if "read_bytes" in counts else None
