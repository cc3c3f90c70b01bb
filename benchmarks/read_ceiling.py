"""How near readers come to what the disk gives: cold, in turn with a bare parallel read of the same bytes.

    python benchmarks/read_ceiling.py [--model qwen2.5-1.5b-shape] [--rounds 11] [--methods streamed,…] [--output FILE]

A share of a ceiling that was measured seconds earlier compares two moments of a disk that others use too. Here every
round reads the same files once by each way, in shuffled order, in one process and with nothing of them in the page
cache: *bare* is `preadv` with O_DIRECT by as many threads, into one buffer a thread, which no reader that keeps its
bytes can beat; an engine's time is that of its tensors, without the model. Memory that tensors are read into is touched
before every round, for a virtual machine's host takes back what is not in use.

Output: a line a round, and one JSON document as the last line: seconds by way (median, least, most, all of them in
order), and the median over rounds of bare / engine, with its range.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.resolve import Checkpoint, prepare_checkpoint
from ladezeit.config.compose import read_option
from ladezeit.loading.base import LoadRequest, TensorEngine
from ladezeit.loading.registry import engine_specs
from ladezeit.system.files import cache_folder
from ladezeit.system.memory_warmup import TOUCHED_TIMES, host_pages, touch_free_memory
from ladezeit.system.page_cache import drop_pages, resident_share
from ladezeit.timing.clock import Clock

SPAN_BYTES = 8 * 2**20


def bare(shards: tuple[Path, ...], threads: int) -> None:
    """Read all bytes of the files directly and keep none."""
    descriptors = [os.open(shard, os.O_RDONLY | os.O_DIRECT) for shard in shards]
    spans = [(fd, at) for fd in descriptors for at in range(0, os.fstat(fd).st_size, SPAN_BYTES)]

    def work(own: list[tuple[int, int]]) -> None:
        with host_pages(SPAN_BYTES) as buffer:
            for fd, at in own:
                os.preadv(fd, [buffer], at)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [spans[number::threads] for number in range(threads)]))
    for fd in descriptors:
        os.close(fd)


def reader(method: str, checkpoint: Checkpoint, scratch: Path) -> Callable[[], None]:
    """Return what brings all tensors of the checkpoint into memory by one engine, and lets go of them."""
    option = read_option("loading", method)
    request = LoadRequest(checkpoint=checkpoint, loading=option, device="cpu", scratch=scratch)
    engine: TensorEngine = engine_specs()[option.engine].make()
    engine.prepare(request)

    def read() -> None:
        with engine.open(request, Clock(time.monotonic_ns())) as loaded:
            assert len(loaded.tensors) == len(checkpoint.tensors)

    return read


def main() -> None:
    """Read in rounds and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-1.5b-shape")
    parser.add_argument("--methods", default="streamed,runai_streamer")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=8, help="of the bare read")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    checkpoint = prepare_checkpoint(read_option("model", arguments.model), cache_folder())
    scratch = Path(tempfile.mkdtemp(prefix="ladezeit-ceiling-"))
    ways: dict[str, Callable[[], None]] = {"bare": lambda: bare(checkpoint.shards, arguments.threads)}
    ways |= {method: reader(method, checkpoint, scratch) for method in arguments.methods.split(",")}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(arguments.rounds + 1):
        order = list(ways)
        random.Random(number).shuffle(order)
        for way in order:
            drop_pages(checkpoint.shards)
            assert resident_share(checkpoint.shards) < 0.01
            touch_free_memory(TOUCHED_TIMES * checkpoint.weight_bytes)
            started = time.perf_counter()
            ways[way]()
            if number:  # the first round brings in the libraries' own code
                seconds[way].append(time.perf_counter() - started)
        if number:
            print({way: round(times[-1], 3) for way, times in seconds.items()}, flush=True)
    report = summary(seconds, checkpoint, arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def summary(seconds: dict[str, list[float]], checkpoint: Checkpoint, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of all rounds."""
    report: dict[str, Any] = {"benchmark": "read_ceiling", "model": arguments.model, "threads": arguments.threads}
    report |= {"bytes": checkpoint.file_bytes, "cpus": os.cpu_count(), "load_average": os.getloadavg(), "ways": {}}
    for way, times in seconds.items():
        shares = [base / own for base, own in zip(seconds["bare"], times, strict=True)]
        report["ways"][way] = {
            "median_s": round(statistics.median(times), 4),
            "range_s": [round(min(times), 4), round(max(times), 4)],
            "gb_per_s": round(checkpoint.file_bytes / 1e9 / statistics.median(times), 3),
            "share_of_bare": round(statistics.median(shares), 3),
            "share_range": [round(min(shares), 3), round(max(shares), 3)],
            "all_s": [round(own, 4) for own in times],
        }
    return report


if __name__ == "__main__":
    main()
