"""Shards to stream, and what it takes to compare what came of them with what they hold."""

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from host_runtime import NativeDevice
from safetensors.torch import save_file

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.safetensors_header import parse_header
from ladezeit.loading.base import LoadedTensors, LoadRequest
from ladezeit.loading.streamed.arguments import StreamedLoading
from ladezeit.loading.streamed.device import HostDevice
from ladezeit.loading.streamed.engine import StreamedEngine
from ladezeit.timing.clock import Clock

EXTENT = 64 * 1024
#: All ways to memory: in place, and through the ring that a GPU's weights take, by Python's threads and without them.
DEVICES: dict[str, Callable[[str], HostDevice | None]] = {
    "in place": lambda name: None,
    "ring": lambda name: HostDevice(),
    "native": lambda name: NativeDevice(),
}
WAYS = pytest.mark.parametrize("way", list(DEVICES))


def checkpoint_of(*shards: Path) -> Checkpoint:
    tensors = []
    for number, shard in enumerate(shards):
        raw = shard.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        tensors.extend(parse_header(raw[8 : 8 + length], len(raw), str(shard), number))
    return Checkpoint(
        shards[0].parent, shards, tuple(tensors), {}, "safetensors", "", False, 0, 0, "float32"
    )  # fmt: skip


def load(checkpoint: Checkpoint, way: str = "in place", progress: Any = None, **arguments: Any) -> LoadedTensors:
    engine = StreamedEngine(DEVICES[way])
    loading = StreamedLoading(name="streamed", **({"extent_bytes": EXTENT} | arguments))
    request = LoadRequest(checkpoint, loading, "cpu", checkpoint.folder, progress=progress)
    engine.prepare(request)
    with engine.open(request, Clock(time.monotonic_ns())) as loaded:
        return loaded


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        mine = found[name]
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), name
        assert mine.is_contiguous()
        assert mine.data_ptr() % mine.element_size() == 0, name
        assert bits(mine) == bits(tensor), name


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.flatten().view(torch.uint8).numpy()) if tensor.numel() else b""


def random_shard(path: Path, size: int = 40 * EXTENT, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 255, (size,), dtype=torch.uint8, generator=generator)
    save_file({"a": data[: size // 4].clone(), "b": data[size // 4 :].clone().view(torch.float16)}, path)
    return path


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
