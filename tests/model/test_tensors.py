"""How weights are split over ranks: each way's parts are the whole, and they are those that torch cuts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from ladezeit.model.tensors import shard_of, shard_spec


@settings(max_examples=60)
@given(
    shape=some.lists(some.integers(1, 9), min_size=1, max_size=3),
    ranks=some.integers(1, 5),
    groups=some.integers(1, 3),
    at=some.integers(0, 2),
)
def test_all_parts_are_the_whole_and_nothing_twice(shape: list[int], ranks: int, groups: int, at: int) -> None:
    """What all ranks together hold is every element once, also where nothing divides."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = [shard_of(whole, shard_spec(at % len(shape), groups), rank, ranks) for rank in range(ranks)]
    assert sorted(torch.cat([one.reshape(-1) for one in parts]).tolist()) == list(range(whole.numel()))


@pytest.mark.parametrize("size", [8, 7, 2])
def test_a_plain_way_is_torchs_own(size: int) -> None:
    """DTensor splits as `chunk` does: the last parts are smaller, or empty."""
    whole = torch.arange(size * 3).view(size, 3)
    chunks = [*whole.chunk(3, 0), torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 3, dtype=torch.int64)]
    for rank in range(3):
        assert torch.equal(shard_of(whole, shard_spec(0, 1), rank, 3), chunks[rank])


def test_of_two_projections_in_one_a_rank_holds_a_part_of_each() -> None:
    """Gate and up one after the other: half of the gate and half of the up, not the gate alone."""
    whole = torch.arange(8)
    assert shard_of(whole, "0/2", 0, 2).tolist() == [0, 1, 4, 5]
    assert shard_of(whole, "0/2", 1, 2).tolist() == [2, 3, 6, 7]
