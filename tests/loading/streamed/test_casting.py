"""Another dtype than the checkpoint's: every bit is what torch's own cast makes of it, whatever the value."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from streamed_for_tests import bits, checkpoint_of

from ladezeit.loading.base import LoadRequest, WeightMapping
from ladezeit.loading.streamed.arguments import StreamedLoading
from ladezeit.loading.streamed.engine import StreamedEngine
from ladezeit.system import page_cache
from ladezeit.timing.clock import Clock

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
PAIRS = [pytest.param(one, other, id=f"{one}-{other}") for one in DTYPES for other in DTYPES if one != other]


def every_value(dtype: torch.dtype, count: int) -> torch.Tensor:
    """All 65,536 values of a short dtype, not-a-numbers too, over and over; as float32 those of bfloat16 and more."""
    if dtype != torch.float32:
        return torch.arange(count).to(torch.int16).view(dtype)
    return (torch.arange(count, dtype=torch.int64) * 65521 % 2**32).to(torch.int32).view(dtype)


@pytest.mark.parametrize(("held", "asked"), PAIRS)
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_every_value_is_cast_as_torch_casts_it(
    held: torch.dtype, asked: torch.dtype, state: str, tmp_path: Path
) -> None:
    """A user who asks for float16 gets the weights that `transformers` would have made, infinities and all."""
    shard = tmp_path / "model.safetensors"
    held_weights = {"long": every_value(held, 3 * 2**20 + 777), "short": every_value(held, 5), "none": torch.empty(0)}
    wanted = {name: bits(weight.to(asked)) for name, weight in held_weights.items()}
    save_file(held_weights, shard)
    del held_weights
    checkpoint = checkpoint_of(shard)
    page_cache.drop_pages([shard]) if state == "cold" else page_cache.warm_pages([shard])
    request = LoadRequest(
        checkpoint,
        StreamedLoading(name="streamed"),
        "cpu",
        tmp_path,
        weight_mapping=WeightMapping(dtypes={entry.name: asked for entry in checkpoint.tensors}),
    )
    with StreamedEngine().open(request, Clock(time.monotonic_ns())) as loaded:
        loaded.wait()
        found = loaded.tensors
    assert {weight.dtype for weight in found.values()} == {asked}
    assert {name: bits(weight) for name, weight in found.items()} == wanted
