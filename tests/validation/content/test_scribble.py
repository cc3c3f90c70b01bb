"""Memory that was given back is overwritten before it is read, wherever in the heap it lies."""

import ctypes

import pytest
import torch

from ladezeit.validation.content import poison_freed_memory


@pytest.mark.parametrize("size", [98_304, 32_768, 12_288])
def test_a_freed_block_between_others_is_overwritten(size: int) -> None:
    """An engine's buffer seldom was the last that was allocated: its block is free among blocks in use."""
    before = [torch.empty(size, dtype=torch.uint8) for _ in range(3)]
    block = torch.zeros(size, dtype=torch.uint8)
    behind = [torch.empty(size, dtype=torch.uint8) for _ in range(3)]
    address = block.data_ptr()
    del block
    filled = poison_freed_memory([size], "cpu")
    left = ctypes.string_at(address, size)
    assert len(before) + len(behind) == 6  # in use until here
    assert left.count(0) < size // 10
    assert filled % size == 0


def test_no_more_is_filled_than_allowed() -> None:
    """A proof of a large model does not fill its memory a second time."""
    assert poison_freed_memory([1000, 700], "cpu", most_bytes=1800) == 1700
    assert poison_freed_memory([2**40], "cpu") == 0
    assert poison_freed_memory([], "cpu") == 0
