"""How long `streamed` takes from its call to its first read: what a load to a GPU waits for before any byte moves.

    python benchmarks/first_read.py [--model qwen2.5-7b-shape] [--rounds 15] [--output FILE]

The checkpoint (15.2 GB, made where it is not there) is brought into the page cache. Each round opens the engine with
host memory behind its ring, which is never touched, notes when the first read of a shard begins, and ends the load
there: once by native readers and once by Python's, in turn. What pinning takes is not in it, for there is no driver
here; it goes on while the load is planned.

Output: a line a round, and one JSON document as the last line: milliseconds by readers (median, least, most, all).
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.resolve import Checkpoint, prepare_checkpoint
from ladezeit.config.compose import read_option
from ladezeit.loading.base import LoadRequest
from ladezeit.loading.streamed import memory as files
from ladezeit.loading.streamed.arguments import StreamedLoading
from ladezeit.loading.streamed.device import HostDevice
from ladezeit.loading.streamed.engine import StreamedEngine
from ladezeit.loading.streamed.plan import Extent
from ladezeit.system.files import cache_folder
from ladezeit.system.gc_pause import pause_gc
from ladezeit.system.page_cache import resident_share, warm_pages
from ladezeit.timing.clock import Clock

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / folder) for folder in ("", "loading/streamed")]
import host_runtime  # noqa: E402


class _Begun(Exception):
    """The first read has begun."""


def until_first_read(checkpoint: Checkpoint, device: HostDevice) -> float:
    """Return the seconds from the call to the first read."""
    native = ctypes.c_double.in_dll(host_runtime.library(), "host_first_read_at")
    native.value = 0.0
    began: list[float] = []
    read = files.ShardFile.read

    def noting(self: files.ShardFile, extent: Extent, memory: memoryview) -> None:
        began.append(time.perf_counter())
        read(self, extent, memory)

    files.ShardFile.read = noting  # type: ignore[method-assign]
    request = LoadRequest(checkpoint, StreamedLoading(name="streamed"), "cuda:0", checkpoint.folder)
    engine = StreamedEngine(device=lambda name: device)
    try:
        with pause_gc():
            started = time.perf_counter()
            with engine.open(request, Clock(time.monotonic_ns())):
                while not began and not native.value:
                    time.sleep(0.001)
                raise _Begun
    except _Begun:
        return (native.value or min(began)) - started
    finally:
        files.ShardFile.read = read  # type: ignore[method-assign]


def main() -> None:
    """Open in rounds and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-7b-shape")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    checkpoint = prepare_checkpoint(read_option("model", arguments.model), cache_folder())
    warm_pages(checkpoint.shards)
    devices: dict[str, Callable[[], HostDevice]] = {"native": host_runtime.NativeDevice, "python": HostDevice}
    found: dict[str, list[float]] = {readers: [] for readers in devices}
    for number in range(arguments.rounds + 1):
        for readers, device in devices.items():
            milliseconds = 1000 * until_first_read(checkpoint, device())
            if number:  # the first round brings in the libraries' own code
                found[readers].append(round(milliseconds, 2))
        if number:
            print({readers: values[-1] for readers, values in found.items()}, flush=True)
    report: dict[str, Any] = {"benchmark": "first_read", "model": arguments.model, "bytes": checkpoint.file_bytes}
    report |= {"cpus": os.cpu_count(), "resident_share": round(resident_share(checkpoint.shards), 4), "ms": {}}
    for readers, values in found.items():
        report["ms"][readers] = {
            "median": round(statistics.median(values), 2),
            "range": [min(values), max(values)],
            "n": len(values),
            "all": values,
        }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
