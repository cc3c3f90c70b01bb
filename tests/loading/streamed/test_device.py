"""The ring on the way to a device: a slot is never filled again before the device has taken what is in it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.safetensors_header import read_header
from ladezeit.errors import LoadError
from ladezeit.loading.base import LoadRequest
from ladezeit.loading.streamed.arguments import StreamedLoading
from ladezeit.loading.streamed.device import CopyStream, HostDevice, Moves, slot_bytes
from ladezeit.loading.streamed.engine import StreamedEngine
from ladezeit.loading.streamed.readers import in_background
from ladezeit.timing.clock import Clock


class LateLane:
    """Copies as late as a device may: only when somebody waits for it, so a slot filled too soon gives wrong bytes."""

    pinned_bytes = 0

    def __init__(self) -> None:
        self._waiting: dict[int, list[Any]] = {}

    def slot_memory(self, slot: torch.Tensor) -> torch.Tensor:
        return slot

    def copy_slot(self, slot: int, moves: Moves) -> None:
        self._waiting.setdefault(slot, []).extend(moves)

    def wait_slot(self, slot: int) -> None:
        for target, source in self._waiting.pop(slot, []):
            target.copy_(source)


class LateDevice(HostDevice):
    """A device whose lanes are late."""

    def __init__(self) -> None:
        self.synchronized = self.unpinned = 0

    def make_stream(self) -> CopyStream:
        return LateLane()

    def synchronize(self) -> None:
        self.synchronized += 1

    def unpin_memory(self) -> None:
        assert self.synchronized
        self.unpinned += 1


class FailingDevice(LateDevice):
    """A device whose copies fail after some."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def make_stream(self) -> CopyStream:
        lane = LateLane()
        copy = lane.copy_slot

        def failing(slot: int, moves: Moves) -> None:
            self._left -= 1
            if self._left < 0:
                raise LoadError("the device is gone")
            copy(slot, moves)

        lane.copy_slot = failing  # type: ignore[method-assign]
        return lane


def assert_given_back(device: LateDevice) -> None:
    in_background.join()  # it goes on behind the load
    assert (device.synchronized, device.unpinned) == (1, 1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    path = tmp_path / "model.safetensors"
    words = torch.frombuffer(bytearray(os.urandom(2**21 + 4096)), dtype=torch.int16)
    save_file({"a": words[:70_001].clone(), "b": words[70_001:].clone()}, path)
    return Checkpoint(tmp_path, (path,), read_header(path).tensors, {}, "safetensors", "", False, 0, 0, "float32")


def load(checkpoint: Checkpoint, device: HostDevice, **arguments: Any) -> dict[str, torch.Tensor]:
    loading = StreamedLoading(name="streamed", extent_bytes=16 * 1024, **arguments)
    request = LoadRequest(checkpoint, loading, "cpu", checkpoint.folder)
    with StreamedEngine(device=lambda name: device).open(request, Clock(0)) as loaded:
        return loaded.tensors


@pytest.mark.parametrize("threads", [1, 8])
def test_a_device_that_copies_late_still_gets_every_byte(threads: int, checkpoint: Checkpoint) -> None:
    """Weights on a GPU are right even where the GPU lags behind the disk: each slot waits for its copy."""
    raw = checkpoint.shards[0].read_bytes()
    device = LateDevice()
    found = load(checkpoint, device, threads=threads)
    for entry in checkpoint.tensors:
        assert found[entry.name].numpy().tobytes() == raw[entry.begin : entry.end]
    assert_given_back(device)


@pytest.mark.parametrize("threads", [1, 8])
def test_a_weight_that_is_given_out_early_is_on_the_device(threads: int, checkpoint: Checkpoint) -> None:
    """A model that takes a weight while others are under way gets its values, not what the memory held before."""
    raw = checkpoint.shards[0].read_bytes()
    loading = StreamedLoading(name="streamed", extent_bytes=16 * 1024, threads=threads)
    request = LoadRequest(checkpoint, loading, "cpu", checkpoint.folder)
    with StreamedEngine(device=lambda name: LateDevice()).open(request, Clock(0)) as loaded:
        for entry in checkpoint.tensors:
            assert loaded.get_tensor(entry.name).numpy().tobytes() == raw[entry.begin : entry.end]


def test_a_device_that_fails_is_closed_and_its_error_shown(checkpoint: Checkpoint) -> None:
    """An error of the GPU ends the load with that error, and the pinned memory is given back."""
    device = FailingDevice(after=5)
    with pytest.raises(LoadError, match="the device is gone"):
        load(checkpoint, device, threads=4)
    assert_given_back(device)


def test_slots_are_whole_pages_within_the_budget() -> None:
    """Direct I/O needs whole pages, and the user's budget of pinned memory is kept."""
    assert slot_bytes(256 * 2**20, 8, 8 * 2**20) == 8 * 2**20
    assert slot_bytes(100_000, 4, 8 * 2**20) == 3 * 4096
    assert slot_bytes(100_000, 4, 8 * 2**20) * 4 * 2 <= 100_000
