"""The road from tensors to a model ends where `from_pretrained` ends, whatever engine the tensors came from."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs_for_tests import model_config
from ladezeit.checkpoint.resolve import Checkpoint, prepare
from ladezeit.config import DType, TensorLoading
from ladezeit.errors import LoadError
from ladezeit.loading.assemble import Assembling
from ladezeit.loading.base import LoadedTensors, LoadRequest
from ladezeit.measure.clock import LOAD, Clock

MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 127,
}


class Reads:
    """The plainest engine: every tensor read into memory of its own."""

    borrowed = False
    drop = ""

    def prepare(self, request: LoadRequest) -> None: ...

    @contextmanager
    def open(self, request: LoadRequest, clock: Clock) -> Iterator[LoadedTensors]:
        with clock.span("load/read"):
            tensors = {}
            for shard in request.checkpoint.shards:
                tensors.update({name: tensor.clone() for name, tensor in load_file(shard).items()})
        tensors.pop(self.drop, None)
        yield LoadedTensors(tensors, self.borrowed, {"by": "the test"})


class Lends(Reads):
    """An engine that overwrites its buffers when it is closed, as those do that use them again."""

    borrowed = True

    @contextmanager
    def open(self, request: LoadRequest, clock: Clock) -> Iterator[LoadedTensors]:
        with super().open(request, clock) as loaded:
            yield loaded
            for tensor in loaded.tensors.values():
                tensor.zero_()


def checkpoint_of(kind: str, cache: Path) -> Checkpoint:
    model = model_config("tiny")
    if kind == "mixture of experts":
        model.name, model.architecture = "tiny-moe", MOE
    elif kind == "untied":
        model.name, model.architecture = "tiny-untied", {**model.architecture, "tie_word_embeddings": False}
    elif kind == "shards":
        model.name, model.shard_bytes = "tiny-shards", 500_000
    return prepare(model, cache)


def load(engine: Any, checkpoint: Checkpoint, dtype: DType = DType.auto) -> Any:
    request = LoadRequest(checkpoint, TensorLoading(name="t", engine="t", dtype=dtype), "cpu", Path("/nowhere"))
    clock = Clock(time.monotonic_ns())
    with clock.span(LOAD):
        loaded = Assembling(engine).load(request, clock)
    return loaded, clock


@pytest.mark.parametrize("engine", [Reads, Lends])
@pytest.mark.parametrize("kind", ["tied", "untied", "shards", "mixture of experts"])
@pytest.mark.parametrize("dtype", [DType.auto, DType.float32])
def test_the_model_equals_from_pretrained(cache: Path, kind: str, engine: type, dtype: DType) -> None:
    """Parameters, buffers, ties, configs, mode and logits: a user can swap one for the other, also after the engine's
    buffers were overwritten."""
    checkpoint = checkpoint_of(kind, cache)
    ours = load(engine(), checkpoint, dtype)[0].model
    theirs: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype.value, device_map="cpu")
    assert type(ours) is type(theirs) and not ours.training
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[name], other[name]) and mine[name].dtype == other[name].dtype for name in mine)
    buffers = dict(theirs.named_buffers())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in ours.named_buffers())
    tied = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert tied == (theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.name_or_path == theirs.name_or_path and ours.config.to_dict() == theirs.config.to_dict()
    ids = torch.tensor([[1, 2, 3, 5]])
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_tensors_that_need_no_conversion_are_not_copied(tiny: Checkpoint) -> None:
    """What the engine read is what the model uses: no second set of weights in memory."""
    engine = Reads()
    kept: dict[str, int] = {}

    class Keeps(Reads):
        @contextmanager
        def open(self, request: LoadRequest, clock: Clock) -> Iterator[LoadedTensors]:
            with engine.open(request, clock) as loaded:
                kept.update({name: tensor.data_ptr() for name, tensor in loaded.tensors.items()})
                yield loaded

    model = load(Keeps(), tiny)[0].model
    placed = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    assert all(placed[name] == kept[name] for name in placed)


def test_a_missing_weight_is_an_error_with_its_name(tiny: Checkpoint) -> None:
    """Nobody gets a model with random numbers where a weight should be."""

    class Forgets(Reads):
        drop = "model.layers.0.mlp.up_proj.weight"

    with pytest.raises(LoadError, match=r"missing: model\.layers\.0\.mlp\.up_proj\.weight"):
        load(Forgets(), tiny)


def test_an_unexpected_weight_is_an_error_with_its_name(tiny: Checkpoint) -> None:
    class Invents(Reads):
        @contextmanager
        def open(self, request: LoadRequest, clock: Clock) -> Iterator[LoadedTensors]:
            with super().open(request, clock) as loaded:
                loaded.tensors["model.layers.9.extra.weight"] = torch.zeros(2)
                yield loaded

    with pytest.raises(LoadError, match=r"unexpected: model\.layers\.9\.extra\.weight"):
        load(Invents(), tiny)


def test_the_phases_of_both_halves_are_told_apart(tiny: Checkpoint) -> None:
    """Reading is the engine's, assigning the library's: a user sees which of the two a load spends its time in."""
    loaded, clock = load(Reads(), tiny)
    phases = {phase.path for phase in clock.phases}
    assert {"load/read", "load/assign", "load/skeleton", "load/finalise", "load/touch"} <= phases
    assert loaded.effective["by"] == "the test" and loaded.effective["seams_missing"] == []


def test_a_user_can_train_a_step_and_save(tiny: Checkpoint, tmp_path: Path) -> None:
    """The weights are ordinary, writable memory that belongs to the model."""
    model = load(Lends(), tiny, DType.float32)[0].model
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.tensor([[1, 2, 3, 5]])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
