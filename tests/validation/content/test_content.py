"""What the level `content` finds in real loads of real checkpoints, and that it raises no false alarm."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from proven_checkpoints import UP, flip_in_file, made, manifest_of, own_copy
from safetensors.torch import load_file, save_file

from ladezeit.checkpoint.resolve import Checkpoint, inspect_checkpoint
from ladezeit.config import DType
from ladezeit.config.engines import arguments_class
from ladezeit.errors import CheckpointError, ran_out_of_memory
from ladezeit.loading import registry
from ladezeit.loading.base import EngineModel, LoadRequest
from ladezeit.loading.conversion import convert_checkpoint
from ladezeit.timing.clock import LOAD, Clock
from ladezeit.validation import digest, manifest
from ladezeit.validation.verification import Verification

Load = Callable[..., EngineModel]
Prove = Callable[..., Verification]

ENGINES = [
    "transformers",
    "streamed",
    "accelerate",
    "safetensors_mmap",
    "safetensors_pread",
    "fastsafetensors",
    "runai_streamer",
    "torch_dcp",
]
PACKAGES = {"fastsafetensors": "fastsafetensors", "runai_streamer": "runai_model_streamer"}
#: Loads tensors by their names alone and refuses a mixture of experts.
BY_NAME = ("accelerate",)
NORM = "model.layers.0.input_layernorm.weight"


def found(proof: Verification) -> set[tuple[str, str]]:
    return {(finding.kind, finding.name) for finding in proof.findings}


@pytest.fixture
def checkpoint(cache: Path) -> Checkpoint:
    return made("tied", cache)


@pytest.fixture
def file(checkpoint: Checkpoint, cache: Path) -> Path:
    return manifest_of(checkpoint, cache)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, DType.bfloat16) for kind in ("tied", "untied", "shards", "experts")),
        *((kind, DType.float32) for kind in ("tied", "experts")),
    ],
)
@pytest.mark.parametrize("name", ENGINES)
def test_a_right_load_is_proven_whatever_the_engine(
    *, kind: str, dtype: DType, name: str, cache: Path, load: Load, proof: Prove
) -> None:
    """No false alarm: renames, merged experts, casts and ties of every engine are those of the reference."""
    if kind == "experts" and name in BY_NAME:
        pytest.skip("refuses a mixture of experts")
    pytest.importorskip(PACKAGES.get(name, "os"))
    checkpoint = made(kind, cache)
    result = proof(load(checkpoint, name, dtype=dtype), manifest_of(checkpoint, cache, dtype.value), dtype)
    assert result.passed, result.reason
    assert "bit for bit" in result.reason
    assert result.metrics["validation/content_bytes"] > checkpoint.weight_bytes * 0.9


@pytest.mark.parametrize("compiled", [True, False])
def test_a_proof_says_what_added_up(
    *, compiled: bool, checkpoint: Checkpoint, file: Path, load: Load, proof: Prove, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person whose proofs are slow finds the reason in the result, and not in our source."""
    if not compiled:
        monkeypatch.setattr(digest, "native_kernel", lambda: None)
    result = proof(load(checkpoint, "streamed"), file)
    assert result.passed, result.reason
    by = "a compiled kernel" if compiled else "numpy (nothing was compiled at installation)"
    assert result.reason.endswith(f"; summed on cpu by {by}")


@pytest.mark.parametrize("kind", ["tied", "experts"])
@pytest.mark.parametrize("name", ["gguf", "tensorizer"])
def test_another_format_holds_what_the_checkpoint_holds(
    name: str, kind: str, cache: Path, tmp_path: Path, proof: Prove
) -> None:
    """A conversion keeps every bit: its load is proven by the manifest of the original."""
    pytest.importorskip(name)
    checkpoint, target = made(kind, cache), registry.make_converter(name)
    assert target is not None
    conversion = convert_checkpoint(target, checkpoint, kind, cache, lambda what, done, total: None)
    request = LoadRequest(checkpoint, arguments_class(name)(name=name), "cpu", tmp_path, conversion=conversion)
    chosen, clock = registry.make_engine(name), Clock(time.monotonic_ns())
    chosen.prepare(request)
    with clock.span(LOAD):
        loaded = chosen.load(request, clock)
    result = proof(loaded, manifest_of(checkpoint, cache))
    assert result.passed, result.reason


@pytest.mark.parametrize("kind", ["tied", "untied", "shards", "experts"])
def test_the_reference_itself_is_traced_to_the_files(kind: str, cache: Path) -> None:
    """The measure that engines are held to is proven by the bytes of the files, merged experts included."""
    said = manifest.read_manifest(manifest_of(made(kind, cache), cache))
    assert said.unanchored == []
    assert sum(said.anchored.values()) > 10
    assert (said.anchored["merged"] > 0) == (kind == "experts")
    cast = manifest.read_manifest(manifest_of(made(kind, cache), cache, "float32"))
    assert cast.anchored["cast"] > 0


def flipped_bit(model: Any) -> None:
    model.get_parameter(UP).data.view(torch.int16).view(-1)[1234] ^= 1


def swapped_words(model: Any) -> None:
    words = model.get_parameter(UP).data.view(-1)
    words[[3, 900]] = words[[900, 3]]


def planted_nan(model: Any) -> None:
    model.get_parameter(UP).data[5, 5] = float("nan")


def swapped_tensors(model: Any) -> None:
    one, other = model.get_parameter(UP).data, model.get_parameter("model.layers.1.mlp.gate_proj.weight").data
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def untied_head(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def buffer_on_meta(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to("meta")


def wrong_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(1.001)


def extra_tensor(model: Any) -> None:
    model.model.norm.register_buffer("scale", torch.ones(3, dtype=torch.bfloat16))


def lost_tensor(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = None


def wrong_shape(model: Any) -> None:
    held = model.get_parameter(NORM)
    held.data = held.data.view(2, -1)


def wrong_dtype(model: Any) -> None:
    held = model.get_parameter(NORM)
    held.data = held.data.to(torch.float32)


def wrongly_tied(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight


FAULTS: list[tuple[Callable[[Any], None], set[tuple[str, str]]]] = [
    (flipped_bit, {("content", UP)}),
    (swapped_words, {("content", UP)}),
    (planted_nan, {("content", UP)}),
    (swapped_tensors, {("content", UP), ("content", "model.layers.1.mlp.gate_proj.weight")}),
    (untied_head, {("tie", "lm_head.weight")}),
    (buffer_on_meta, {("meta", "model.rotary_emb.inv_freq")}),
    (wrong_frequencies, {("content", "model.rotary_emb.inv_freq")}),
    (extra_tensor, {("unexpected", "model.norm.scale")}),
    (lost_tensor, {("missing", UP)}),
    (wrong_shape, {("shape", NORM)}),
    (wrong_dtype, {("dtype", NORM)}),
    (wrongly_tied, {("content", UP), ("tie", UP)}),
]


@pytest.mark.parametrize(("fault", "findings"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault_in_memory_is_named(
    *, fault: Callable[[Any], None], findings: set[tuple[str, str]], checkpoint: Checkpoint, file: Path, load: Load,
    proof: Prove
) -> None:  # fmt: skip
    """Whatever differs is found and named once, with its kind, and nothing else is."""
    loaded = load(checkpoint, "safetensors_pread")
    fault(loaded.model)
    result = proof(loaded, file)
    assert not result.passed
    assert found(result) == findings


def test_swapped_tensors_are_called_by_whose_content_they_have(
    checkpoint: Checkpoint, file: Path, load: Load, proof: Prove
) -> None:
    """Somebody who looks for the cause is told that the content is there, under another name."""
    loaded = load(checkpoint, "safetensors_pread")
    swapped_tensors(loaded.model)
    assert "it is that of model.layers.1.mlp.gate_proj.weight" in proof(loaded, file).reason


@pytest.mark.parametrize("name", ENGINES)
def test_a_bit_that_flipped_in_the_file_is_found_with_every_engine(
    *, name: str, damaged: tuple[Checkpoint, Path], cache: Path, load: Load, proof: Prove
) -> None:
    """No engine notices a flipped bit; the proof does."""
    pytest.importorskip(
        {"fastsafetensors": "fastsafetensors", "runai_streamer": "runai_model_streamer"}.get(name, "os")
    )
    copy, file = damaged
    assert manifest_of(copy, cache, building=lambda: pytest.fail("was made again")) == file
    assert found(proof(load(copy, name), file)) == {("content", UP)}


def test_a_merged_expert_is_proven_too(cache: Path, tmp_path: Path, load: Load, proof: Prove) -> None:
    """A flipped bit in one expert shows in the tensor that the library makes of all of them."""
    copy = own_copy(made("experts", cache), tmp_path / "copy")
    file = manifest_of(copy, cache)
    flip_in_file(copy, "model.layers.1.mlp.experts.2.up_proj.weight")
    assert found(proof(load(copy), file)) == {("content", "model.layers.1.mlp.experts.gate_up_proj")}


def test_offloaded_tensors_are_read_where_they_are_kept(
    checkpoint: Checkpoint, file: Path, load: Load, proof: Prove, tmp_path: Path
) -> None:
    """Offload that was asked for is proven like anything else: by what a forward will find."""
    layers = {f"model.layers.{n}": "disk" if n else "cpu" for n in range(4)}
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", **layers}
    loaded = load(checkpoint, device_map=places, disable_cpu_offload=False, offload_folder=str(tmp_path / "away"))
    asked: Any = {"single_device": False, "offload_allowed": True}
    result = proof(loaded, file, **asked)
    assert result.passed, result.reason
    assert result.metrics["validation/content_bytes"] > 0.9 * checkpoint.weight_bytes
    hook = loaded.model.model.layers[1].mlp.up_proj._hf_hook
    hook.weights_map.dataset.state_dict[UP] = torch.zeros_like(hook.weights_map["weight"])
    assert found(proof(loaded, file, **asked)) == {("content", UP)}


def test_memory_that_ran_out_is_no_fault_of_the_model(
    checkpoint: Checkpoint, file: Path, load: Load, proof: Prove, tmp_path: Path
) -> None:
    """A host too full to bring an offloaded tensor in says nothing of the tensor: the sample is `oom`, not `wrong`."""
    places = {"model": "disk", "lm_head": "disk"}
    loaded = load(checkpoint, device_map=places, disable_cpu_offload=False, offload_folder=str(tmp_path / "away"))

    class Full(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    loaded.model.model.layers[1].mlp.up_proj._hf_hook.weights_map.dataset = Full()
    with pytest.raises(OSError, match="Cannot allocate memory") as full:
        proof(loaded, file, single_device=False, offload_allowed=True)
    assert ran_out_of_memory(full.value)


def test_silent_offload_is_found_although_its_content_is_right(
    checkpoint: Checkpoint, file: Path, load: Load, proof: Prove, tmp_path: Path
) -> None:
    """The level holds what `placement` holds: right bytes in the wrong place are wrong."""
    from accelerate import disk_offload

    loaded = load(checkpoint)
    disk_offload(loaded.model.model.layers[1], str(tmp_path / "away"), execution_device=torch.device("cpu"))
    result = proof(loaded, file)
    assert {kind for kind, _ in found(result)} == {"offload"}
    assert ("offload", UP) in found(result)


def test_all_findings_are_in_the_proof_and_ten_in_the_reason(
    checkpoint: Checkpoint, file: Path, load: Load, proof: Prove
) -> None:
    """A model that is wrong throughout gives a reason one can read and a whole list."""
    loaded = load(checkpoint, "safetensors_pread")
    for parameter in loaded.model.parameters():
        parameter.data.zero_()
    result = proof(loaded, file)
    assert len(result.findings) > 20
    assert result.reason.endswith(f"and {len(result.findings) - 10} more")


def test_a_tensor_left_in_memory_that_was_given_back_is_found(
    checkpoint: Checkpoint, file: Path, load: Load, proof: Prove
) -> None:
    """The right bytes in freed memory are overwritten before they are read, as their next user would."""
    loaded = load(checkpoint, "safetensors_pread")
    held = loaded.model.get_parameter(UP)
    block = torch.empty(held.numel() * held.element_size(), dtype=torch.uint8)
    raw = block.numpy()
    raw[:] = held.data.view(torch.uint8).view(-1).numpy()
    address = raw.ctypes.data
    del raw, block  # the tensor below is what an engine leaves that frees its buffer too early
    import ctypes

    import numpy as np

    freed = (ctypes.c_uint8 * (held.numel() * held.element_size())).from_address(address)
    dangling = torch.from_numpy(np.frombuffer(freed, dtype=np.uint8)).view(torch.bfloat16).view(held.shape)
    loaded.model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(dangling, requires_grad=False)
    loaded.lent_bytes = [held.numel() * held.element_size()]
    result = proof(loaded, file)
    assert found(result) == {("content", UP)}
    assert result.metrics["validation/scribbled_bytes"] >= held.numel() * held.element_size()


def test_a_checkpoint_that_lacks_a_tensor_has_no_manifest(checkpoint: Checkpoint, cache: Path, tmp_path: Path) -> None:
    """transformers makes up what is missing with a line in its log: that is never made the measure of others."""
    copy = own_copy(checkpoint, tmp_path / "copy")
    tensors = load_file(copy.shards[0])
    del tensors[UP]
    save_file(tensors, copy.shards[0], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors of its model .{UP}.*Fetch"):
        manifest_of(inspect_checkpoint(copy.folder, "copy"), cache)


def test_a_reference_that_is_not_the_files_is_refused(checkpoint: Checkpoint) -> None:
    """Were transformers itself wrong, its load would be refused as a measure, and named."""
    from transformers import AutoModelForCausalLM

    from ladezeit.validation.digest import digest_tensors
    from ladezeit.validation.inventory import list_tensors
    from ladezeit.validation.provenance import trace_to_files

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.bfloat16)
    model.get_parameter(UP).data = model.get_parameter(UP).data.clone()
    flipped_bit(model)
    held = list_tensors(model)
    with pytest.raises(CheckpointError, match=f"does not hold what its files hold in 1 tensors .{UP}"):
        trace_to_files(checkpoint, held, digest_tensors({one.name: one.tensor for one in held}))


def test_a_copy_on_the_same_device_is_no_tie_whatever_was_asked(
    checkpoint: Checkpoint, file: Path, load: Load, proof: Prove
) -> None:
    """Several devices excuse a copy of a tied weight only where the two lie on different ones."""
    loaded = load(checkpoint, "safetensors_pread")
    untied_head(loaded.model)
    result = proof(loaded, file, single_device=False)
    assert found(result) == {("tie", "lm_head.weight")}
