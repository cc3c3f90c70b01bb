"""The engine `streamed` through its ring beyond toy size: again and again, every tensor by its digest.

A slot that is filled before the device took what was in it, or a cast that reads too early, gives wrong bytes now and
then, and only where many slots are under way. On a GPU the checkpoint has 2 GiB; the same code runs here at some
megabytes, with host memory behind the ring.
"""

import json
import struct
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_runtime import NativeDevice

from ladezeit.checkpoint.dtypes import torch_dtype
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.safetensors_header import TensorEntry, read_header
from ladezeit.config import CacheState
from ladezeit.loading.base import FusedParameter, LoadRequest, Slice, WeightMapping
from ladezeit.loading.streamed.arguments import StreamedLoading
from ladezeit.loading.streamed.device import HostDevice
from ladezeit.loading.streamed.engine import StreamedEngine
from ladezeit.system import page_cache
from ladezeit.timing.clock import Clock
from ladezeit.validation.digest import digest_tensors

EXPERTS = 8
#: What each load finds in the page cache.
STATES = (CacheState.cold, CacheState.warm, CacheState.half, CacheState.warm, CacheState.cold)
#: Where the first tensor of each shard begins, modulo 16: at odd bytes, where no dtype can, too.
BEGINS = (0, 8, 1, 2)


@dataclass(frozen=True)
class Size:
    """How large the matrices are, how the engine is told to read them, and the device behind the ring."""

    rows: int
    columns: int
    arguments: dict[str, Any]
    device: str


SMALL = Size(128, 512, {"threads": 8, "extent_bytes": 64 * 1024, "ring_bytes": 2**20}, "cpu")
LARGE = Size(4096, 8192, {}, "cuda:0")


def finite(dtype: str, count: int, generator: np.random.Generator) -> bytes:
    """Return the bytes of random numbers that float16 can hold, rounded: what is no number may be cast in many ways."""
    if dtype == "BF16":
        words = generator.integers(0, 2**16, count, dtype=np.uint16)
        return ((words & 0x87FF) | 0x3800).tobytes()
    if dtype == "F32":
        return generator.standard_normal(count, dtype=np.float32).tobytes()
    return generator.bytes(count)


def write(path: Path, begin: int, tensors: list[tuple[str, str, tuple[int, ...]]], seed: int) -> Path:
    """Write a shard whose first tensor begins at `begin` modulo 16; the others follow without a gap."""
    header: dict[str, Any] = {}
    position = 0
    for name, dtype, shape in tensors:
        size = int(np.prod(shape)) * {"BF16": 2, "F32": 4, "U8": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode()
    raw += b" " * ((begin - 8 - len(raw)) % 16)
    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for _, dtype, shape in tensors:
            file.write(finite(dtype, int(np.prod(shape)), generator))
    return path


def make(folder: Path, size: Size) -> Checkpoint:
    """Write four shards: experts to be stacked over two of them, what no dtype is aligned to, and what is cast."""
    rows, columns = size.rows, size.columns
    experts = [
        (f"experts.{number}.{part}", "BF16", (rows // 4, columns))
        for number in range(EXPERTS)
        for part in ("gate", "up", "down")
    ]
    half = len(experts) // 2 + 1  # in the middle of an expert
    odd = [("odd.bytes", "U8", (4099,)), ("odd.scale", "F32", (columns,)), ("odd.weight", "BF16", (rows, columns))]
    plain = [(f"plain.{number}", "BF16", (rows, columns)) for number in range(16)]
    cast = [(f"cast.{number}", "F32", (rows, columns)) for number in range(6)]
    shifted = [("small", "U8", (7,)), ("shifted", "BF16", (rows, columns))]
    contents = [experts[:half], [*experts[half:], *cast, *shifted], odd, plain]
    paths = [
        write(folder / f"model-{number}.safetensors", begin, tensors, number)
        for number, (begin, tensors) in enumerate(zip(BEGINS, contents, strict=True))
    ]
    entries = tuple(entry for number, path in enumerate(paths) for entry in read_header(path, number).tensors)
    assert {path.name: entry.begin % 16 for path in paths for entry in read_header(path).tensors[:1]} == {
        path.name: begin for path, begin in zip(paths, BEGINS, strict=True)
    }
    weight_bytes = sum(entry.end - entry.begin for entry in entries)
    return Checkpoint(
        folder, tuple(paths), entries, {}, "safetensors", "", False, weight_bytes, weight_bytes, "float32"
    )


def arrangement_of(checkpoint: Checkpoint) -> WeightMapping:
    """Return what a mixture of experts in float16 wants: gate above up, cast and stacked; down stacked as it is."""
    by_name = {entry.name: entry for entry in checkpoint.tensors}

    def stacked(name: str, *parts: str) -> FusedParameter:
        first = by_name[f"experts.0.{parts[0]}"]
        rows, columns = first.shape
        found = [
            Slice(by_name[f"experts.{number}.{part}"], (number * len(parts) + above) * rows * columns)
            for above, part in enumerate(parts)
            for number in range(EXPERTS)
        ]
        names = tuple(tuple(f"experts.{number}.{part}" for number in range(EXPERTS)) for part in parts)
        return FusedParameter(name, (EXPERTS, len(parts) * rows, columns), first.dtype, tuple(found), names)

    cast = [name for name in by_name if name.startswith("cast.") or name.endswith((".gate", ".up"))]
    merged = (stacked("experts.gate_up", "gate", "up"), stacked("experts.down", "down"))
    return WeightMapping(merged, dict.fromkeys(cast, torch.float16))


def wanted_digests(checkpoint: Checkpoint, arrangement: WeightMapping) -> dict[str, str]:
    """Return the digest of each tensor as torch itself makes it of the files' bytes, on the host."""
    files = [np.fromfile(shard, dtype=np.uint8) for shard in checkpoint.shards]

    def read(entry: TensorEntry) -> torch.Tensor:
        dtype = torch_dtype(entry.dtype)
        assert isinstance(dtype, torch.dtype)
        data = files[entry.shard][entry.begin : entry.end].copy()  # aligned
        found = torch.from_numpy(data).view(dtype).view(entry.shape)
        return found.to(arrangement.dtypes.get(entry.name, dtype))

    by_name = {entry.name: entry for entry in checkpoint.tensors}
    found: dict[str, str] = {}
    for one in arrangement.fused:
        columns = [torch.stack([read(by_name[name]) for name in column]) for column in one.columns]
        found |= digest_tensors({one.name: torch.cat(columns, dim=1)})
        for name in (name for column in one.columns for name in column):
            del by_name[name]
    for name, entry in by_name.items():
        found |= digest_tensors({name: read(entry)})
    return found


def engine_for(size: Size, readers: str) -> StreamedEngine:
    if size.device != "cpu":
        return StreamedEngine()
    return StreamedEngine(device=lambda name: NativeDevice() if readers == "native" else HostDevice())


def poison(tensors: dict[str, torch.Tensor]) -> None:
    """Overwrite what was loaded: the next load may get the same memory, where a byte that it forgot must be wrong."""
    for tensor in tensors.values():
        tensor.reshape(-1).view(torch.uint8).fill_(0xA5)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()


@pytest.mark.parametrize("readers", ["native", "python"])
@pytest.mark.parametrize("size", [SMALL, pytest.param(LARGE, marks=pytest.mark.gpu)], ids=["small", "large"])
def test_every_load_brings_every_bit(size: Size, readers: str, tmp_path: Path) -> None:
    """Five loads in a row, cold, warm and half, give the weights of a model bit for bit, wherever they lie in files."""
    checkpoint = make(tmp_path, size)
    assert size is SMALL or checkpoint.weight_bytes >= 2 * 2**30
    arrangement = arrangement_of(checkpoint)
    if readers == "native":  # what is cast is left to Python's
        arrangement = replace(arrangement, dtypes={})
    wanted = wanted_digests(checkpoint, arrangement)
    loading = StreamedLoading(name="streamed", **size.arguments)
    request = LoadRequest(checkpoint, loading, size.device, tmp_path, weight_mapping=arrangement)
    for number, state in enumerate(STATES):
        page_cache.set_state(checkpoint.shards, state)
        with engine_for(size, readers).open(request, Clock(time.monotonic_ns())) as loaded:
            loaded.wait()
        tensors = loaded.tensors
        assert {str(tensor.device) for tensor in tensors.values()} == {size.device}
        assert loaded.effective["readers"] == readers
        assert loaded.effective["ring_bytes"] > 0 and loaded.effective["extents"] > 2 * loaded.effective["threads"]
        found = digest_tensors(tensors)
        differing = sorted(name for name in wanted if found.get(name) != wanted[name])
        assert found.keys() == wanted.keys() and not differing, f"load {number} ({state.value}): {differing}"
        poison(tensors)
