"""The road from tensors to a model ends where `from_pretrained` ends, whatever engine the tensors came from."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, conversion_mapping

from configs_for_tests import TINY_MOE, model_config
from ladezeit.checkpoint.resolve import Checkpoint, prepare_checkpoint
from ladezeit.config import DType, TensorLoading
from ladezeit.errors import LoadError
from ladezeit.loading.base import LoadedTensors, LoadRequest, WeightMapping
from ladezeit.loading.build_model import StateDictEngine
from ladezeit.loading.streamed.arguments import StreamedLoading
from ladezeit.loading.streamed.device import HostDevice
from ladezeit.loading.streamed.engine import StreamedEngine
from ladezeit.loading.weight_mapping import Names, plan_weight_mapping
from ladezeit.system import page_cache
from ladezeit.timing.clock import LOAD, Clock


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
        yield LoadedTensors(tensors, self.borrowed, effective={"by": "the test"})


class Lends(Reads):
    """An engine that overwrites its buffers when it is closed, as those do that use them again."""

    borrowed = True

    @contextmanager
    def open(self, request: LoadRequest, clock: Clock) -> Iterator[LoadedTensors]:
        with super().open(request, clock) as loaded:
            yield loaded
            for tensor in loaded.tensors.values():
                tensor.zero_()


def streamed() -> StreamedEngine:
    """Our own reader, which puts merged and cast tensors in place while it reads."""
    return StreamedEngine()


def streamed_through_a_ring() -> StreamedEngine:
    """The same, by the way that weights take to a GPU."""
    return StreamedEngine(device=lambda name: HostDevice())


def checkpoint_of(kind: str, cache: Path) -> Checkpoint:
    model = model_config("tiny")
    if kind == "mixture of experts":
        model.name, model.architecture = "tiny-moe", TINY_MOE
    elif kind == "experts over shards":
        model.name, model.architecture, model.shard_bytes = "tiny-moe-shards", TINY_MOE, 60_000
    elif kind == "untied":
        model.name, model.architecture = "tiny-untied", {**model.architecture, "tie_word_embeddings": False}
    elif kind == "shards":
        model.name, model.shard_bytes = "tiny-shards", 500_000
    return prepare_checkpoint(model, cache)


def load(engine: Any, checkpoint: Checkpoint, dtype: DType = DType.auto) -> Any:
    if isinstance(engine, StreamedEngine):  # extents so small that tensors are cut into several
        loading: TensorLoading = StreamedLoading(name="t", dtype=dtype, extent_bytes=16 * 1024)
    else:
        loading = TensorLoading(name="t", engine="t", dtype=dtype)
    request = LoadRequest(checkpoint, loading, "cpu", Path("/nowhere"))
    clock = Clock(time.monotonic_ns())
    with clock.span(LOAD):
        loaded = StateDictEngine(engine).load(request, clock)
    return loaded, clock


@pytest.mark.parametrize("engine", [Reads, Lends, streamed, streamed_through_a_ring])
@pytest.mark.parametrize("kind", ["tied", "untied", "shards", "mixture of experts", "experts over shards"])
@pytest.mark.parametrize("dtype", [DType.auto, DType.float32, DType.float16])
def test_the_model_equals_from_pretrained(cache: Path, kind: str, engine: Any, dtype: DType) -> None:
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


@pytest.mark.parametrize("state", ["cold", "warm"])
@pytest.mark.parametrize("dtype", [DType.auto, DType.float16])
@pytest.mark.parametrize("kind", ["shards", "experts over shards"])
def test_streamed_puts_tensors_in_place_from_disk_and_from_memory(
    cache: Path, kind: str, state: str, dtype: DType
) -> None:
    """Merged and cast weights are right whether their bytes came past the page cache, out of it, or from a mapping."""
    checkpoint = checkpoint_of(kind, cache)
    page_cache.drop_pages(checkpoint.shards) if state == "cold" else page_cache.warm_pages(checkpoint.shards)
    loaded = load(streamed(), checkpoint, dtype)[0]
    theirs: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype.value, device_map="cpu")
    mine = loaded.model.state_dict()
    assert all(torch.equal(mine[name], other) for name, other in theirs.state_dict().items())
    read = loaded.effective["bytes_read_direct"]
    assert (read > 0.9 * checkpoint.weight_bytes) if state == "cold" else (read < 0.1 * checkpoint.weight_bytes)


@pytest.mark.parametrize("engine", [Reads, streamed])
def test_a_mixture_of_experts_is_saved_in_its_own_layout(engine: Any, cache: Path, tmp_path: Path) -> None:
    """Who loads, trains and saves gets the checkpoint's tensors by their names, as after a load by transformers."""
    checkpoint = checkpoint_of("mixture of experts", cache)
    load(engine(), checkpoint)[0].model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    original = {name: tensor for shard in checkpoint.shards for name, tensor in load_file(shard).items()}
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())


def test_experts_are_arranged_as_the_library_would_merge_them(cache: Path) -> None:
    """Each layer's experts are two parameters, made of every expert's tensors in the experts' order."""
    checkpoint = checkpoint_of("mixture of experts", cache)
    found = plan_weight_mapping(LoadRequest(checkpoint, TensorLoading(name="t", engine="t"), "cpu", Path("/nowhere")))
    assert found.reason is None and not found.dtypes
    merged = {one.name: one for one in found.fused}
    assert merged.keys() == {
        f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")
    }
    gate_up = merged["model.layers.1.mlp.experts.gate_up_proj"]
    names = [tuple(f"model.layers.1.mlp.experts.{n}.{kind}_proj.weight" for n in range(4)) for kind in ("gate", "up")]
    assert gate_up.columns == tuple(names)
    assert [part.start for part in gate_up.slices] == [n * 64 * 64 for n in range(4)] + [
        n * 64 * 64 + 32 * 64 for n in range(4)
    ]


def test_reading_a_dense_model_waits_for_no_answer_of_the_library(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building the library's table of conversions takes longer than planning the read: it is built meanwhile."""
    asked: list[str] = []
    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", asked.append)
    assert (
        plan_weight_mapping(LoadRequest(tiny, TensorLoading(name="t", engine="t"), "cpu", Path("/nowhere")))
        == WeightMapping()
    )
    assert not asked


def test_what_cannot_be_arranged_is_left_to_the_library_and_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a release of transformers that works otherwise a load is slower, not wrong, and the result says why."""
    checkpoint = checkpoint_of("mixture of experts", cache)
    wanted = load(Reads(), checkpoint)[0].model.state_dict()

    def other_release(*_: Any) -> None:
        raise ImportError("cannot import name 'no_init_weights'")

    monkeypatch.setattr("ladezeit.loading.weight_mapping.build_on_meta", other_release)
    loaded = load(Reads(), checkpoint)[0]
    assert "no_init_weights" in loaded.effective["arranged"]["left_to_the_library"]
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_kind_of_key_that_is_not_renamed_alike_is_asked_one_by_one() -> None:
    """A mapping that treats one layer otherwise is followed for that layer, not generalised from its neighbours."""
    from transformers.core_model_loading import WeightRenaming

    keys = [f"model.layers.{layer}.weight" for layer in range(12)]
    wanted = {key.replace("layers.11", "last"): None for key in keys}
    names = Names([WeightRenaming(r"layers\.11\.", "last.")], "model", wanted)
    assert [target for target, _ in names.resolve_name(keys)] == list(wanted)
