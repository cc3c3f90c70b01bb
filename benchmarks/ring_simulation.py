"""What the ring to a GPU makes of a link, without a GPU: `streamed` as it is, against a link and memory that sleep.

    python benchmarks/ring_simulation.py [--shapes dense,experts] [--readers native,python] [--link-gb-per-s 55]
                    [--threads 8,10,12,14,16] [--slot-mib 8] [--switch-ms 0.1] [--runs 5] [--output FILE]

What is real: the engine with its threads, plan, queue, slots and waits; the interpreter's lock; the model that is built
meanwhile (on `meta`); one call of cachestat an extent; views and calls a copy. What sleeps, at rates that the arguments
give: a read (`preadv` out of the page cache, which copies as fast as one core does, 6.5 GB/s here), a copy to the
device (a link that takes one after the other), pinning and unpinning (0.2 and 0.1 ms a MiB; the driver does one at a
time). For what torch's `copy_`, the record of an event and the wait for it cost the interpreter, each copy holds it for
20 µs more. *native* readers (`_native_readers.c`) sleep in the same places, in `tests/loading/streamed/host_runtime.c`,
and find real pages for their slots. So a machine of two cores can tell how threads, slots and the switch interval
behave beside a GPU of sixteen; it knows nothing of the memory bus that reads and copies share there.

The time is that of a load: the arrangement, the plan, and the reading until the last copy has ended.

*dense* is Qwen2.5-7B (15.2 GB, 339 tensors), *experts* Qwen3-30B-A3B (61.1 GB, 18,867 tensors), *small experts* the
option qwen3-moe-shape (1.4 GB in as many tensors). Files are holes of that length: nothing is written or read.

Output: a line a run, and one JSON document as the last line: for each setting GB/s and milliseconds (median, least,
most, all), and what the same ring would make without an interpreter (`ideal_gb_per_s`, by arithmetic).
"""

import argparse
import ctypes
import heapq
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ladezeit.checkpoint import synthetic
from ladezeit.checkpoint.resolve import Checkpoint, inspect_checkpoint
from ladezeit.checkpoint.synthetic import tensor_layout
from ladezeit.config import SyntheticModel
from ladezeit.config.compose import read_option
from ladezeit.loading.base import LoadRequest
from ladezeit.loading.streamed import memory as files
from ladezeit.loading.streamed import readers
from ladezeit.loading.streamed.arguments import StreamedLoading
from ladezeit.loading.streamed.device import SLOTS_A_THREAD, CopyStream, Moves
from ladezeit.loading.streamed.engine import StreamedEngine
from ladezeit.loading.streamed.native_readers import Runtime
from ladezeit.loading.streamed.plan import Extent
from ladezeit.loading.weight_mapping import plan_weight_mapping
from ladezeit.model.classes import model_class
from ladezeit.system.gc_pause import pause_gc
from ladezeit.timing.clock import Clock

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / folder) for folder in ("", "loading/streamed")]
import host_runtime  # noqa: E402

MIB = 2**20
MEMCPY_BYTES_PER_S = 6.5e9
PIN_S_PER_BYTE = 0.2e-3 / MIB
UNPIN_S_PER_BYTE = 0.1e-3 / MIB
#: For so long a copy's calls of torch hold the interpreter: an estimate, to be compared with a GPU machine.
CALLS_S = 20e-6

#: Qwen3-30B-A3B, which the option qwen3-moe-shape has in names and number of tensors alone.
_SIZES_30B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "head_dim": 128,
}
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "dense": ("qwen2.5-7b-shape", {}),
    "experts": ("qwen3-moe-shape", _SIZES_30B),
    "small experts": ("qwen3-moe-shape", {}),
}


class Link:
    """Takes one copy after the other."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def send(self, size: int) -> float:
        """Queue a copy of `size` bytes and return when it will have ended, by `time.perf_counter`."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + size / self._bytes_per_s
            return self._free_at


class SimulatedDevice:
    """A `device.Device` behind a link; its memory has no bytes."""

    numa_local: frozenset[int] = frozenset()

    def __init__(self, link: Link, native: bool) -> None:
        self.link, self._native = link, native
        self.driver = threading.Lock()
        self.pinned_bytes = 0

    def allocate_memory(self, size: int) -> torch.Tensor:
        """Return `size` bytes of no memory."""
        return torch.empty(size, dtype=torch.uint8, device="meta")

    def load_runtime(self) -> Runtime | None:
        """Return functions that sleep, where native readers are to be simulated."""
        return host_runtime.NativeDevice().load_runtime() if self._native else None

    def make_stream(self) -> CopyStream:
        """Return a thread's lane."""
        return SimulatedLane(self)

    def synchronize(self) -> None:
        """Nothing is under way: each thread has waited for its own copies."""

    def unpin_memory(self) -> None:
        """Sleep as long as the driver would take."""
        time.sleep(UNPIN_S_PER_BYTE * self.pinned_bytes)


class SimulatedLane:
    """A `device.CopyStream` whose copies sleep until the link has passed them."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.pinned_bytes = 0
        self._device = device
        self._ends = [0.0] * SLOTS_A_THREAD

    def slot_memory(self, slot: torch.Tensor) -> torch.Tensor:
        """Sleep as long as pinning takes, while no other thread pins."""
        with self._device.driver:
            time.sleep(PIN_S_PER_BYTE * slot.numel())
            self._device.pinned_bytes += slot.numel()
        self.pinned_bytes += slot.numel()
        return slot

    def copy_slot(self, slot: int, moves: Moves) -> None:
        """Queue copies on the link."""
        for target, source in moves:
            held_until = time.perf_counter() + CALLS_S
            target.copy_(source.to("meta"))
            self._ends[slot] = self._device.link.send(source.nbytes)
            while time.perf_counter() < held_until:
                pass

    def wait_slot(self, slot: int) -> None:
        """Sleep until the link has passed them."""
        time.sleep(max(0.0, self._ends[slot] - time.perf_counter()))


def hollow(name: str, root: Path) -> Checkpoint:
    """Make a checkpoint of one of `SHAPES` whose files are headers and holes."""
    option, sizes = SHAPES[name]
    model = read_option("model", option)
    assert isinstance(model, SyntheticModel)
    model.architecture.update(sizes)
    folder = root / name.replace(" ", "-")
    folder.mkdir()
    specs = tensor_layout(model.architecture)
    shards = synthetic.plan_shards(specs, model.shard_bytes)
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(len(shard.header) + sum(specs[number].byte_count for number in shard.tensors))
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(synthetic.index_json(specs, shards))
    (folder / "config.json").write_text(json.dumps(synthetic.config_json(model.architecture)))
    return inspect_checkpoint(folder, name)


@contextmanager
def sleeping_reads() -> Iterator[None]:
    """Have every read of a shard sleep as long as a copy out of the page cache takes, and every byte be there."""
    read, resident = files.ShardFile.read, files.ShardFile.is_resident

    def sleep(self: files.ShardFile, extent: Extent, memory: memoryview) -> None:
        time.sleep(extent.size / MEMCPY_BYTES_PER_S)

    def ask(self: files.ShardFile, begin: int, end: int) -> bool:
        resident(self, begin, end)
        return True

    files.ShardFile.read, files.ShardFile.is_resident = sleep, ask  # type: ignore[method-assign]
    try:
        yield
    finally:
        files.ShardFile.read, files.ShardFile.is_resident = read, resident  # type: ignore[method-assign]


def simulate(checkpoint: Checkpoint, link: Link, native: bool, threads: int, slot: int) -> dict[str, float]:
    """Load once; returns seconds from the start to the end, and of its parts."""
    loading = StreamedLoading(
        name="streamed", threads=threads, extent_bytes=slot, ring_bytes=threads * SLOTS_A_THREAD * slot
    )
    request = LoadRequest(checkpoint, loading, "cuda:0", checkpoint.folder)
    own_class: Any = model_class(checkpoint.config)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(checkpoint.folder))
    engine = StreamedEngine(device=lambda name: SimulatedDevice(link, native))
    with pause_gc():
        started = time.perf_counter()
        request = replace(request, weight_mapping=plan_weight_mapping(request))
        arranged = time.perf_counter()
        with engine.open(request, Clock(time.monotonic_ns())) as loaded:
            planned = time.perf_counter()
            with torch.device("meta"):
                own_class._from_config(config, dtype=torch.bfloat16)
            for name in loaded.by_name:
                loaded.get_tensor(name)
            loaded.wait()
            ended = time.perf_counter()
    whole = loaded.effective["whole_read_s"]
    return {"load": ended - started, "arrange": arranged - started, "plan": planned - arranged, "read": whole}


def ideal(size: int, link_bytes_per_s: float, threads: int, slot: int) -> float:
    """Return the seconds from the first pinning to the last copy's end where nothing but reads, copies and pins counts.

    Each thread pins a slot, fills it, queues its copy, and goes on with the other slot when that one's copy has ended.
    """
    pin_s, read_s, copy_s = PIN_S_PER_BYTE * slot, slot / MEMCPY_BYTES_PER_S, slot / link_bytes_per_s
    # (when a thread can go on, its number); each has the ends of its two slots' copies, None where not pinned yet
    ready = [(0.0, number) for number in range(threads)]
    ends: list[list[float | None]] = [[None] * SLOTS_A_THREAD for _ in range(threads)]
    turns = [0] * threads
    driver_free = link_free = 0.0
    for _ in range(-(-size // slot)):
        now, number = heapq.heappop(ready)
        end = ends[number][turns[number]]
        if end is None:
            driver_free = now = max(now, driver_free) + pin_s
        else:
            now = max(now, end)
        now += read_s
        link_free = max(link_free, now) + copy_s
        ends[number][turns[number]] = link_free
        turns[number] = (turns[number] + 1) % SLOTS_A_THREAD
        heapq.heappush(ready, (now, number))
    return link_free


@dataclass(frozen=True)
class Setting:
    """What is compared."""

    readers: str
    threads: int
    slot_bytes: int
    switch_ms: float


def main() -> None:
    """Simulate every combination and report."""
    numbers = partial(str.split, sep=",")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="dense,experts", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--readers", type=numbers, default=["native", "python"])
    parser.add_argument("--link-gb-per-s", type=float, default=55.0)
    parser.add_argument("--threads", type=numbers, default=["8", "10", "12", "14", "16"])
    parser.add_argument("--slot-mib", type=numbers, default=["8"])
    parser.add_argument("--switch-ms", type=numbers, default=["0.1"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    report: dict[str, Any] = {"benchmark": "ring_simulation", "cpus": os.cpu_count(), "torch": torch.__version__}
    report |= {"link_gb_per_s": arguments.link_gb_per_s, "settings": []}
    with tempfile.TemporaryDirectory(prefix="ladezeit-ring-") as root, sleeping_reads():
        ctypes.c_double.in_dll(host_runtime.library(), "host_link_rate").value = arguments.link_gb_per_s * 1e9
        ctypes.c_double.in_dll(host_runtime.library(), "host_read_rate").value = MEMCPY_BYTES_PER_S
        ctypes.c_double.in_dll(host_runtime.library(), "host_pin_s_per_byte").value = PIN_S_PER_BYTE
        for shape in arguments.shapes.split(","):
            checkpoint = hollow(shape, Path(root))
            axes = (arguments.readers, arguments.threads, arguments.slot_mib, arguments.switch_ms)
            settings = [
                Setting(kind, int(threads), int(float(slot) * MIB), float(switch))
                for kind, threads, slot, switch in product(*axes)
            ]
            runs: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in settings}
            for number in range(arguments.runs + 1):
                for setting in settings:  # in turn, so that a machine that slows down slows all of them
                    readers._SWITCH_S = setting.switch_ms / 1000
                    link = Link(arguments.link_gb_per_s * 1e9)
                    native = setting.readers == "native"
                    found = simulate(checkpoint, link, native, setting.threads, setting.slot_bytes)
                    if number:  # the first round brings in the libraries' own code
                        runs[setting].append(found)
            for setting in settings:
                line = summary(shape, checkpoint.weight_bytes, setting, runs[setting], arguments.link_gb_per_s)
                print(json.dumps({key: line[key] for key in list(line)[:9]}), flush=True)
                report["settings"].append(line)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def summary(
    shape: str, size: int, setting: Setting, runs: list[dict[str, float]], link_gb_per_s: float
) -> dict[str, Any]:
    """Return the figures of one setting."""
    rates = [size / 1e9 / run["load"] for run in runs]
    best_s = ideal(size, link_gb_per_s * 1e9, setting.threads, setting.slot_bytes)
    read_s = statistics.median(run["read"] for run in runs)
    return {
        "shape": shape,
        "readers": setting.readers,
        "threads": setting.threads,
        "slot_mib": setting.slot_bytes / MIB,
        "switch_ms": setting.switch_ms,
        "gb_per_s": round(statistics.median(rates), 2),
        "range_gb_per_s": [round(min(rates), 2), round(max(rates), 2)],
        "read_gb_per_s": round(size / 1e9 / read_s, 2),
        "ideal_gb_per_s": round(size / 1e9 / best_s, 2),
        "bytes": size,
        "n": len(runs),
        "ms": {part: [round(1000 * run[part], 2) for run in runs] for part in runs[0]},
    }


if __name__ == "__main__":
    main()
