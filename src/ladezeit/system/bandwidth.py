"""The ceilings: which rates this machine allows, so that a load can say how much of the possible it reached.

    python -m ladezeit.system.bandwidth <request.json> <answer.json>

They are measured in a process of their own, because that touches much memory and, on a GPU, needs torch and a context.
Measuring changes nothing: the checkpoint's files are only read, and no page of theirs comes into the page cache.
"""

import errno
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ladezeit.config import CacheState
from ladezeit.errors import CheckpointError, LadezeitError, WorkerError
from ladezeit.system import rates
from ladezeit.system.limits import available_cpus
from ladezeit.system.page_cache import COLD_BELOW, WARM_ABOVE, drop_pages, resident_share, warm_pages
from ladezeit.system.processes import answer_request, run_module_json
from ladezeit.system.residency import filesystem_type
from ladezeit.system.staged_transfer import to_cuda

#: A process that imports torch from a cold disk needs most of this; the measurement itself takes some seconds.
LIMIT_S = 90.0
_IN_MEMORY = ("tmpfs", "ramfs")
#: Less than this in the page cache is copied too quickly to be timed: a temporary file stands in for it.
_ENOUGH_BYTES = 64 * 2**20
_STAND_IN_BYTES = 256 * 2**20
_ON_CPU = "the device is the CPU"


@dataclass(frozen=True)
class Ceilings:
    """The best rates found, in GB/s (10⁹ bytes per second); None where there is none, with why in `reasons`.

    `tries` tells of each rate how often it was tried, with how many threads and bytes the best try was made, and what
    the slowest try came to. Its keys and those of `reasons` are the fields' names without the unit. `seconds` is what
    the measurement took.
    """

    storage_gb_per_s: float | None = None
    page_cache_gb_per_s: float | None = None
    mapping_gb_per_s: float | None = None
    memcpy_gb_per_s: float | None = None
    host_to_device_pinned_gb_per_s: float | None = None
    host_to_device_pageable_gb_per_s: float | None = None
    staged_gb_per_s: float | None = None
    tries: dict[str, dict[str, float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def get_rate(self, name: str) -> float | None:
        """Return the rate called `name` in GB/s, for example ``storage``."""
        rate: float | None = getattr(self, f"{name}_gb_per_s")
        return rate

    def to_plain(self) -> dict[str, Any]:
        """Return plain data for `from_plain`, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Ceilings":
        """Rebuild what `to_plain` returned; raises `TypeError` where it is something else."""
        return cls(**plain)


def binding_ceiling(
    ceilings: Ceilings,
    cache_state: CacheState,
    device: str,
    keeps_dtype: bool,
    *,
    resident_share: float | None = None,
    written_per_read: float = 1.0,
) -> tuple[str, float] | None:
    """Return which ceiling limits a load, and its rate in GB/s of checkpoint; None where it was not measured.

    Args:
        ceilings: what the machine allows.
        cache_state: the state that the load started in.
        device: ``cpu`` or ``cuda:N``.
        keeps_dtype: whether the weights stay as they are; on the CPU nothing is copied then.
        resident_share: for `as_is`, the share of the shards in the page cache, 0 to 1. The seconds that each byte
            takes are mixed by it: the share from memory at the warm rate, the rest at the cold one.
        written_per_read: bytes of weights in memory for each byte of checkpoint, where the dtype changes. A copy at
            ``memcpy`` reads and writes each byte, so a conversion that writes w bytes for each that it reads moves
            (1 + w) / 2 as many, and its ceiling is ``memcpy`` × 2 / (1 + w).
    """
    cold = _slowest(ceilings, _parts(device, keeps_dtype, "storage"), written_per_read)
    warm = _slowest(ceilings, _parts(device, keeps_dtype, None), written_per_read)
    if cache_state is CacheState.cold:
        return cold
    if cache_state is CacheState.warm:
        return warm
    if resident_share is None or math.isnan(resident_share):
        return None
    if resident_share > WARM_ABOVE:
        return warm
    if resident_share < COLD_BELOW or cold is None or warm is None:
        return cold if resident_share < COLD_BELOW else None
    mixed = 1 / (resident_share / warm[1] + (1 - resident_share) / cold[1])
    return "+".join(dict.fromkeys((warm[0], cold[0]))), mixed


def _parts(device: str, keeps_dtype: bool, storage: str | None) -> list[str]:
    """Return the stages that each byte passes; they can overlap, so that the slowest alone is the limit.

    On the way from the page cache to a GPU copy and transfer overlap, but share the memory bus: together they are one
    stage, measured as one. What comes from storage is written into pinned memory by the disk itself and read from there
    by the GPU: less than a copy and a transfer ask of the bus.
    """
    if device.startswith("cuda"):
        return ["staged"] if storage is None else [storage, "host_to_device_pinned"]
    if storage is not None:
        return [storage] if keeps_dtype else [storage, "memcpy"]
    return ["mapping"] if keeps_dtype else ["memcpy"]


def _slowest(ceilings: Ceilings, parts: list[str], written_per_read: float) -> tuple[str, float] | None:
    found = []
    for name in parts:
        rate = ceilings.get_rate(name)
        if rate is None:
            return None
        found.append((name, rate * 2 / (1 + written_per_read) if name == "memcpy" else rate))
    return min(found, key=lambda one: one[1])


def measure_ceilings(device: str, shards: Sequence[Path]) -> Ceilings:
    """Measure in this process, in about 5 s without and 15 s with a GPU; what cannot be measured is None with a reason.

    Args:
        device: ``cpu`` or ``cuda:N``, whose link is measured too.
        shards: the checkpoint's files; their state in the page cache stays as it is.
    """
    started = time.monotonic()
    cpus = available_cpus()
    found: dict[str, list[rates.Try]] = {}
    reasons: dict[str, str] = {}

    def attempt(name: str, tries: Callable[[], list[rates.Try]]) -> None:
        try:
            found[name] = tries()
        except (OSError, RuntimeError, LadezeitError) as cause:  # torch's errors are RuntimeErrors
            reasons[name] = str(cause).strip().split("\n")[0][:200] or type(cause).__name__

    attempt("storage", lambda: _storage(shards))
    attempt("page_cache", lambda: _cached(shards, lambda files: rates.measure_page_cache(files, cpus)))
    attempt("mapping", lambda: _cached(shards, lambda files: rates.measure_mapping(files, cpus)))
    attempt("memcpy", lambda: rates.measure_memory(cpus))
    for name, pinned in (("host_to_device_pinned", True), ("host_to_device_pageable", False)):
        if device.startswith("cuda"):
            attempt(name, partial(rates.measure_host_to_device, device, pinned))
        else:
            reasons[name] = _ON_CPU
    if device.startswith("cuda"):  # last: the driver may refuse to pin so much, and torch would meet that error again
        attempt(
            "staged", lambda: _cached(shards, lambda files: rates.measure_staged(files, cpus, partial(to_cuda, device)))
        )
    else:
        reasons["staged"] = _ON_CPU
    best = {f"{name}_gb_per_s": max(one.gb_per_s for one in tries) for name, tries in found.items()}
    told = {name: _told(tries) for name, tries in found.items()}
    return Ceilings(**best, tries=told, reasons=reasons, seconds=round(time.monotonic() - started, 3))


def measure_apart(device: str, shards: Sequence[Path]) -> Ceilings:
    """Measure in a process of its own.

    Raises:
        WorkerError: that process failed or took longer than `LIMIT_S`.
        OutOfMemoryError: memory ran out there.
    """
    request = {"device": device, "shards": [str(shard) for shard in shards]}
    what = "the measurement of its ceilings"
    return Ceilings.from_plain(
        run_module_json(
            "ladezeit.system.bandwidth", request, f"device={device}", what, limit_s=LIMIT_S, error=WorkerError
        )
    )


def _told(tries: list[rates.Try]) -> dict[str, float]:
    best = max(tries, key=lambda one: one.gb_per_s)
    least = min(one.gb_per_s for one in tries)
    return {"n": len(tries), "threads": best.threads, "bytes": best.moved_bytes, "least_gb_per_s": least}


def _storage(shards: Sequence[Path]) -> list[rates.Try]:
    kinds = {filesystem_type(shard) for shard in shards} & set(_IN_MEMORY)
    if kinds:
        raise CheckpointError(f"the checkpoint lies on {min(kinds)}, which is memory")
    before = resident_share(shards)
    try:
        with _opened(shards, os.O_DIRECT) as files:
            tries = rates.measure_storage(files)
    except OSError as cause:
        if cause.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        raise CheckpointError(f"{filesystem_type(shards[0])} refuses direct reads") from cause
    if resident_share(shards) > before + COLD_BELOW:
        if before == 0:
            drop_pages(shards)
        raise CheckpointError(f"{filesystem_type(shards[0])} reads through the page cache when asked for direct reads")
    return tries


def _cached(shards: Sequence[Path], tries: Callable[[list[int]], list[rates.Try]]) -> list[rates.Try]:
    """Measure on those shards that are wholly in the page cache, or on a temporary file on the same file system."""
    whole = [shard for shard in shards if resident_share([shard]) == 1.0]
    if sum(shard.stat().st_size for shard in whole) >= _ENOUGH_BYTES:
        with _opened(whole) as files:
            return tries(files)
    with tempfile.TemporaryFile(dir=shards[0].resolve().parent, buffering=0) as stand_in:
        piece = os.urandom(rates.SPAN_BYTES)
        for _ in range(_STAND_IN_BYTES // len(piece)):
            stand_in.write(piece)
        # As cache=warm brings a checkpoint in: pages that were written lie in larger pieces than pages that were read.
        own = Path(f"/proc/self/fd/{stand_in.fileno()}")
        drop_pages([own])
        warm_pages([own])
        return tries([stand_in.fileno()])


@contextmanager
def _opened(paths: Sequence[Path], flags: int = 0) -> Iterator[list[int]]:
    with ExitStack() as stack:
        files = []
        for path in paths:
            files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags))
            stack.callback(os.close, files[-1])
        yield files


def make(request: dict[str, Any]) -> dict[str, Any]:
    """Measure in this process; returns plain data."""
    return measure_ceilings(request["device"], [Path(shard) for shard in request["shards"]]).to_plain()


if __name__ == "__main__":
    sys.exit(answer_request(make, sys.argv[1:]))
