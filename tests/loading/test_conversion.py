"""Engines with a format of their own load what the checkpoint holds, and the conversion is never part of a load."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from configs_for_tests import TINY_MOE, make_run_config, model_config
from ladezeit.checkpoint.resolve import Checkpoint, inspect_checkpoint, prepare_checkpoint
from ladezeit.config import CacheConfig, CacheState, DType
from ladezeit.config.engines import arguments_class
from ladezeit.errors import CheckpointError, LoadError, NotRunnableError, OutOfMemoryError
from ladezeit.loading import registry
from ladezeit.loading.base import Conversion, LoadRequest
from ladezeit.loading.conversion import conversion_for, convert_checkpoint
from ladezeit.results.records import Identity, Status
from ladezeit.runner.spec import WorkerSpec
from ladezeit.runner.supervisor import Supervisor
from ladezeit.system import page_cache
from ladezeit.timing.clock import LOAD, Clock

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rope_theta": 5e5,
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "tensorizer": ("tensorizer", {}),
    "tensorizer_verify_hash": ("tensorizer", {"verify_hash": True}),
    "gguf": ("gguf", {}),
}
#: accelerate reads safetensors like others, and of experts a copy in which they are merged.
METHODS_OF_EXPERTS = {**METHODS, "accelerate": ("accelerate", {})}


@pytest.fixture(scope="module")
def checkpoints(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """One checkpoint of each kind that a format has to take apart in a way of its own."""
    several, experts = model_config("tiny"), model_config("tiny")
    several.name, several.shard_bytes = "tiny-shards", 500_000
    experts.name, experts.architecture = "tiny-moe", TINY_MOE
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True, tie_word_embeddings=True))
    llama.generation_config.temperature, llama.generation_config.do_sample = 0.3, True
    llama.to(torch.bfloat16).save_pretrained(folder / "llama")
    Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=32)).to(torch.float16).save_pretrained(folder / "qwen3")
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(folder / "float32")
    return {
        "tied": prepare_checkpoint(model_config("tiny"), cache),
        "shards": prepare_checkpoint(several, cache),
        "mixture of experts": prepare_checkpoint(experts, cache),
        **{kind: inspect_checkpoint(folder / kind, kind) for kind in ("llama", "qwen3", "float32")},
    }


@pytest.fixture(autouse=True)
def warm(request: pytest.FixtureRequest) -> None:
    """Conversions are made in forks of a warm process, except where a test is about the process."""
    if request.node.get_closest_marker("own_process") is None:
        request.getfixturevalue("warm_references")


def converted(name: str, checkpoint: Checkpoint, cache: Path) -> Conversion:
    target = registry.make_converter(name)
    assert target is not None
    return convert_checkpoint(target, checkpoint, "test", cache, lambda what, done, total: None)


def load(method: str, checkpoint: Checkpoint, conversion: Conversion | None, dtype: DType = DType.auto) -> Any:
    name, arguments = METHODS_OF_EXPERTS[method]
    loading = arguments_class(name)(name=method, engine=name, dtype=dtype, **arguments)
    request = LoadRequest(checkpoint, loading, "cpu", Path("/nowhere"), conversion=conversion)
    engine = registry.make_engine(name)
    engine.prepare(request)
    clock = Clock(time.monotonic_ns())
    with clock.span(LOAD):
        return engine.load(request, clock)


def bits(tensor: Any) -> bytes:
    whole: bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return whole


def own_copy(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    return inspect_checkpoint(shutil.copytree(checkpoint.folder, folder / "own"), "own")


KINDS = ("tied", "shards", "mixture of experts", "llama", "qwen3", "float32")
#: What each dtype is cast to and from, with and without experts that are merged.
CASTS = (
    ("mixture of experts", DType.float32),
    ("mixture of experts", DType.float16),
    ("tied", DType.float16),
    ("llama", DType.float32),
    ("qwen3", DType.float32),
    ("float32", DType.float16),
)


@pytest.mark.parametrize(
    ("method", "kind", "dtype"),
    [
        *((method, kind, DType.auto) for method in ("tensorizer", "gguf") for kind in KINDS),
        *((method, *cast) for method in ("tensorizer", "gguf") for cast in CASTS),
        *(("tensorizer_verify_hash", kind, DType.auto) for kind in ("shards", "mixture of experts")),
        *(("accelerate", "mixture of experts", dtype) for dtype in (DType.auto, DType.float32, DType.float16)),
    ],
)
def test_the_model_equals_from_pretrained(
    method: str, kind: str, dtype: DType, checkpoints: dict[str, Checkpoint], cache: Path
) -> None:
    """Every parameter and buffer bit for bit, ties, configs, mode and logits: the format changes nothing but speed."""
    checkpoint = checkpoints[kind]
    ours = load(method, checkpoint, converted(METHODS_OF_EXPERTS[method][0], checkpoint, cache), dtype).model
    theirs: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype.value, device_map="cpu")
    assert type(ours) is type(theirs) and not ours.training
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(mine[name].dtype == other[name].dtype and bits(mine[name]) == bits(other[name]) for name in other)
    buffers = dict(theirs.named_buffers())
    found = dict(ours.named_buffers())
    assert found.keys() == buffers.keys() and all(bits(found[name]) == bits(buffers[name]) for name in buffers)
    tied = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert tied == (theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight)
    assert tied == (kind in ("tied", "shards", "llama"))
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.name_or_path == theirs.name_or_path and ours.config.to_dict() == theirs.config.to_dict()
    ids = torch.tensor([[1, 2, 3, 5]])
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("tensorizer", "gguf") for kind in ("tied", "mixture of experts")),
        ("accelerate", "mixture of experts"),
    ],
)
def test_a_model_can_be_saved_again(
    name: str, kind: str, checkpoints: dict[str, Checkpoint], cache: Path, tmp_path: Path
) -> None:
    """A fine-tuned model goes back to disk under the names that everybody's loaders know."""
    checkpoint = checkpoints[kind]
    load(name, checkpoint, converted(name, checkpoint, cache)).model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    there = {name: tensor for shard in checkpoint.shards for name, tensor in load_file(shard).items()}
    assert saved.keys() == there.keys() and all(bits(saved[name]) == bits(there[name]) for name in there)


@pytest.mark.parametrize("name", ["tensorizer", "gguf", "accelerate"])
def test_writing_to_a_weight_changes_no_file(name: str, checkpoints: dict[str, Checkpoint], cache: Path) -> None:
    """Who trains a model does not spoil the cache for the next load."""
    checkpoint = checkpoints["mixture of experts"]
    conversion = converted(name, checkpoint, cache)
    before = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (*conversion.files, *checkpoint.shards)]
    model = load(name, checkpoint, conversion).model
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(7)
    del model
    assert before == [hashlib.sha256(path.read_bytes()).hexdigest() for path in (*conversion.files, *checkpoint.shards)]


@pytest.fixture
def damaged(checkpoints: dict[str, Checkpoint], cache: Path, tmp_path: Path) -> Iterator[Callable[..., Conversion]]:
    """Return a copy of a conversion of "tied" that a test may damage."""

    def copy(name: str) -> Conversion:
        made = converted(name, checkpoints["tied"], cache)
        folder = shutil.copytree(made.folder, tmp_path / name)
        return replace(made, folder=folder, files=tuple(folder / path.name for path in made.files))

    yield copy


@pytest.mark.parametrize("method", METHODS)
def test_a_truncated_file_is_refused(
    method: str, damaged: Callable[..., Conversion], checkpoints: dict[str, Checkpoint]
) -> None:
    """tensorizer itself would go on, with whatever the memory held before in place of the missing weights."""
    conversion = damaged(METHODS[method][0])
    os.truncate(conversion.files[-1], conversion.files[-1].stat().st_size - 100)
    with pytest.raises(LoadError, match=r"has \d+ bytes in its files, and had \d+ when they were made\. Remove"):
        load(method, checkpoints["tied"], conversion)
    conversion.files[-1].unlink()
    with pytest.raises(LoadError, match=r"has 0 bytes in its files"):
        load(method, checkpoints["tied"], conversion)


@pytest.mark.parametrize("method", METHODS)
def test_a_flipped_bit_is_found_by_hashes_alone(
    method: str, damaged: Callable[..., Conversion], checkpoints: dict[str, Checkpoint]
) -> None:
    """What `verify_hash` buys; this records that without it neither format notices."""
    checkpoint = checkpoints["tied"]
    conversion = damaged(METHODS[method][0])
    first = checkpoint.tensors[0]
    weights = load_file(checkpoint.shards[0])[first.name]
    raw = bytearray(conversion.files[0].read_bytes())
    raw[raw.index(bits(weights)[:4096])] ^= 1
    conversion.files[0].write_bytes(raw)
    if method == "tensorizer_verify_hash":
        with pytest.raises(LoadError, match=r"is damaged: Tensor .* failed CRC32 verification.*Remove its folder"):
            load(method, checkpoint, conversion)
        return
    loaded = load(method, checkpoint, conversion).model.state_dict()
    assert bits(loaded[first.name]) != bits(weights)


def test_a_file_of_another_kind_is_refused(
    damaged: Callable[..., Conversion], checkpoints: dict[str, Checkpoint]
) -> None:
    conversion = damaged("tensorizer")
    conversion.files[0].write_bytes(bytes(conversion.file_bytes))
    with pytest.raises(LoadError, match=r"is damaged: Not a tensorizer file"):
        load("tensorizer", checkpoints["tied"], conversion)


@pytest.mark.own_process
@pytest.mark.parametrize("name", ["tensorizer", "gguf"])
def test_it_is_made_once_and_anew_when_the_checkpoint_changes(
    name: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """The second sweep starts at once; weights that were trained on in place are not mistaken for their old copy."""
    checkpoint, cache = own_copy(checkpoints["tied"], tmp_path), tmp_path / "cache"
    first = converted(name, checkpoint, cache)
    stamps = [path.stat().st_mtime_ns for path in first.files]
    assert first.seconds > 0 and first.file_bytes >= checkpoint.weight_bytes
    assert converted(name, checkpoint, cache) == first
    assert [path.stat().st_mtime_ns for path in first.files] == stamps
    tensors = load_file(checkpoint.shards[0])
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3)
    save_file(tensors, checkpoint.shards[0], {"format": "pt"})
    changed = inspect_checkpoint(checkpoint.folder, "own")
    second = converted(name, changed, cache)
    assert second.folder != first.folder
    assert load(name, changed, second).model.model.norm.weight.eq(3).all()


@pytest.mark.own_process
def test_a_half_made_conversion_never_stays(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """A shard that is cut while it is converted: one line that says so, and no folder for the next load to trust."""
    checkpoint, cache = own_copy(checkpoints["tied"], tmp_path), tmp_path / "cache"
    os.truncate(checkpoint.shards[0], checkpoint.file_bytes // 2)
    with pytest.raises(CheckpointError, match=r"model=test: .* became shorter while it was converted"):
        converted("tensorizer", checkpoint, cache)
    assert [path for path in (cache / "tensorizer").iterdir() if path.suffix != ".lock"] == []


@pytest.mark.own_process
def test_a_conversion_that_finds_no_memory_is_out_of_memory(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """The checkpoint is as it should be: nobody fetches it again because the host was full."""
    with pytest.raises(
        OutOfMemoryError, match=r"model=own: memory ran out in the conversion of .*: .*can't allocate memory"
    ):
        convert_checkpoint(
            "engines_for_tests:FillsTheHostWriting", checkpoints["tied"], "own", tmp_path, lambda *told: None
        )
    assert [path for path in (tmp_path / "tensorizer").iterdir() if path.suffix != ".lock"] == []


@pytest.mark.own_process
def test_a_checkpoint_that_changes_meanwhile_is_not_kept(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Somebody saves into the folder during the conversion: half old, half new weights are nobody's model."""
    checkpoint, cache = own_copy(checkpoints["tied"], tmp_path), tmp_path / "cache"
    target = registry.make_converter("gguf")
    assert target is not None
    with pytest.raises(CheckpointError, match="changed while it was converted"):
        convert_checkpoint(target, checkpoint, "own", cache, lambda what, done, total: os.utime(checkpoint.shards[0]))
    assert [path for path in (cache / "gguf").iterdir() if path.suffix != ".lock"] == []


def test_without_room_nothing_is_written(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error with both sizes, before the first byte."""
    monkeypatch.setattr("ladezeit.checkpoint.cache._RESERVE_BYTES", 2**60)
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes .* are free\. Free some, or set LADEZEIT_CACHE"):
        converted("gguf", checkpoints["tied"], tmp_path)
    assert [path for path in (tmp_path / "gguf").iterdir() if path.suffix != ".lock"] == []


def test_another_architecture_is_skipped_by_name(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Before a sweep starts, with the ones that work; and so are dtypes that GGUF would have to change."""
    other = replace(checkpoints["tied"], config={**checkpoints["tied"].config, "model_type": "gpt_neox"})
    with pytest.raises(NotRunnableError, match=r"type llama, qwen2, qwen3, qwen3_moe: this one is gpt_neox\. Use"):
        converted("gguf", other, tmp_path)
    wide = replace(checkpoints["tied"], tensors=(replace(checkpoints["tied"].tensors[0], dtype="F64"),))
    with pytest.raises(NotRunnableError, match=r"keeps tensors of F32, F16, BF16: this checkpoint has F64"):
        converted("gguf", wide, tmp_path)
    packed = replace(checkpoints["tied"], tensors=(replace(checkpoints["tied"].tensors[0], dtype="F4"),))
    with pytest.raises(NotRunnableError, match=r"tensorizer cannot hold tensors of F4"):
        converted("tensorizer", packed, tmp_path)


def test_only_experts_are_merged_for_accelerate(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """A dense model is read as it is: no second copy of its weights lies on the disk."""
    for kind in ("tied", "shards", "llama"):
        assert conversion_for("accelerate", checkpoints[kind], "test", tmp_path, lambda what, done, total: None) is None
    assert list(tmp_path.iterdir()) == []


def test_experts_over_shards_are_merged(cache: Path, tmp_path: Path) -> None:
    """The file is what transformers itself writes in the model's own layout, whatever shards the experts lay in."""
    model = model_config("tiny")
    model.name, model.architecture, model.shard_bytes = "tiny-moe-shards", TINY_MOE, 60_000
    checkpoint = prepare_checkpoint(model, cache)
    assert len(checkpoint.shards) > 2
    theirs: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="auto")
    theirs.save_pretrained(tmp_path, save_original_format=False)
    wanted = load_file(tmp_path / "model.safetensors")
    found = load_file(converted("accelerate", checkpoint, cache).files[0])
    assert found.keys() == wanted.keys() and all(bits(found[name]) == bits(wanted[name]) for name in wanted)


def test_thousands_of_tensors_become_several_files(tmp_path: Path) -> None:
    """tensorizer's table holds about 2,500 tensors, and a mixture of experts has many times as many."""
    folder = tmp_path / "many"
    folder.mkdir()
    names = [f"model.layers.{number}.mlp.experts.{number}.gate_proj.weight" for number in range(4000)]
    save_file({name: torch.tensor([number]) for number, name in enumerate(names)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    checkpoint = inspect_checkpoint(folder, "many")
    conversion = converted("tensorizer", checkpoint, tmp_path)
    assert len(conversion.files) > 1
    request = LoadRequest(
        checkpoint, arguments_class("tensorizer")(name="t"), "cpu", Path("/nowhere"), conversion=conversion
    )
    engine: Any = registry.make_engine("tensorizer")
    with engine._engine.open(request, Clock(time.monotonic_ns())) as loaded:
        assert [int(loaded.tensors[name]) for name in names] == list(range(4000))


@pytest.mark.parametrize("name", ["tensorizer", "gguf"])
def test_cold_means_the_files_that_are_read(
    name: str, checkpoints: dict[str, Checkpoint], tmp_path: Path, supervisor: Supervisor
) -> None:
    """The shards' state says nothing about a load that never opens them; the result names the files and their cost."""
    checkpoint = own_copy(checkpoints["tied"], tmp_path)
    conversion = converted(name, checkpoint, tmp_path / "cache")
    loading = arguments_class(name)(name=name, engine=name)
    config = make_run_config(tmp_path, loading=loading, cache=CacheConfig(CacheState.cold))
    spec = WorkerSpec(
        config, checkpoint, Identity("0" * 12, 0, 0, "t", [], "t"), "cpu", tmp_path, conversion=conversion
    )
    page_cache.set_state(spec.files, CacheState.cold)
    page_cache.warm_pages(checkpoint.shards)
    result = supervisor.run_sample(spec, lambda phase: None)
    assert result.status is Status.ok, result.reason
    assert result.metrics["cache/resident_before_share"] < 0.01
    assert result.metrics["cache/resident_after_share"] > 0.5, "read through the page cache, from these files"
    assert result.effective["conversion"] == conversion.to_json()
    assert result.metrics["load/file_bytes"] == conversion.file_bytes
    again = supervisor.run_sample(spec, lambda phase: None)
    assert again.status is Status.invalid and "cache=cold was asked" in (again.reason or "")


def test_a_load_without_its_conversion_says_how_to_make_it(checkpoints: dict[str, Checkpoint]) -> None:
    with pytest.raises(LoadError, match=r"reads a format of its own.*ladezeit\.loading\.conversion\.convert"):
        load("gguf", checkpoints["tied"], None)
