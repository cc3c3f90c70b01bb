"""What `placement` accepts because it was asked for, and what it refuses although it looks harmless."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_qwen2
from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM, MT5Config, MT5ForConditionalGeneration

from ladezeit.errors import CheckpointError
from ladezeit.loading.base import EngineModel
from ladezeit.validation.expected import Expected
from ladezeit.validation.model_checks import fp32_exceptions, stored_generation_config
from ladezeit.validation.placement import ResolvedDeviceMap, device_name
from ladezeit.validation.verification import Verification

Load = Callable[..., EngineModel]
Prove = Callable[..., Verification]


def disk_places() -> dict[str, str]:
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return dict.fromkeys(names, "cpu") | {f"model.layers.{n}": "disk" if n > 9 else "cpu" for n in range(12)}


def test_offload_that_was_allowed_passes(load: Load, expected: Expected, proof: Prove, tmp_path: Path) -> None:
    """`disable_cpu_offload=false` means it: a model half on disk is a legitimate answer."""
    loaded = load(device_map=disk_places(), offload_folder=str(tmp_path))
    result = proof(loaded, replace(expected, single_device=False, offload_allowed=True), "placement")
    assert result.passed, result.reason
    assert "offloaded as allowed" in result.reason


def test_meta_without_a_hook_is_no_offload_even_where_offload_is_allowed(
    load: Load, expected: Expected, proof: Prove, tmp_path: Path
) -> None:
    """Only a tensor that will be brought in for its forward counts as offloaded; one that is lost is lost."""
    loaded = load(device_map=disk_places(), offload_folder=str(tmp_path))
    held = loaded.model.model.layers[0].mlp.up_proj
    held.weight = torch.nn.Parameter(held.weight.to("meta"))
    result = proof(loaded, replace(expected, single_device=False, offload_allowed=True), "placement")
    assert [(finding.kind, finding.name) for finding in result.findings] == [
        ("meta", "model.layers.0.mlp.up_proj.weight")
    ]


def test_unasked_offload_is_named_by_module_and_by_tensor(
    load: Load, expected: Expected, proof: Prove, tmp_path: Path
) -> None:
    """Silent offload, the slowest surprise there is, is shown with everything it took away."""
    loaded = load(device_map=disk_places(), offload_folder=str(tmp_path))
    names = {finding.name for finding in proof(loaded, expected, "placement").findings}
    assert {"model.layers.10", "model.layers.11", "model.layers.10.mlp.up_proj.weight"} <= names


def test_a_model_left_on_the_host_is_found(load: Load, proof: Prove) -> None:
    """A load that was to go to the GPU and stayed on the host names every tensor, and a GPU is not needed to see it."""
    asked = Expected("cuda:0", "float16", single_device=True, offload_allowed=False)
    result = proof(load(), asked, "placement")
    assert len(result.findings) == result.tensors_seen
    assert {finding.kind for finding in result.findings} == {"device"}
    assert "is on cpu, asked for cuda:0" in result.reason


def test_rotary_frequencies_keep_their_own_dtype(load: Load, expected: Expected, proof: Prove) -> None:
    """Buffers that no checkpoint holds are float32 by design: a float16 model is right with them."""
    loaded = load()
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert proof(loaded, expected, "placement").passed


def test_a_stored_buffer_of_another_dtype_is_found(load: Load, expected: Expected, proof: Prove) -> None:
    """Buffers that the checkpoint holds are weights like any other."""
    loaded = load()
    loaded.model.model.norm.register_buffer("scale", torch.ones(1, dtype=torch.float32))
    result = proof(loaded, expected, "placement")
    assert [finding.name for finding in result.findings] == ["model.norm.scale"]


def test_weights_that_the_class_lists_for_float32_must_be_float32(
    load: Load, expected: Expected, proof: Prove, tmp_path: Path
) -> None:
    """mT5's `wo` overflows in float16: transformers keeps it in float32, and losing that is a fault."""
    config = MT5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0)
    MT5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = MT5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.dtype == torch.float32
    assert proof(EngineModel(model), expected, "placement").passed
    wo.to(torch.float16)
    result = proof(EngineModel(model), expected, "placement")
    assert [(f.kind, f.detail) for f in result.findings] == [("dtype", "is float16, asked for float32")]


def test_weights_that_the_class_makes_float32_unlisted_are_let_pass(
    expected: Expected, proof: Prove, tmp_path: Path
) -> None:
    """HunYuan's router is float32 in its code and in no list: a right load must not be called wrong for it."""
    config = HunYuanMoEV1Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        num_experts=2,
        moe_topk=1,
    )
    HunYuanMoEV1ForCausalLM(config).save_pretrained(tmp_path)
    model = HunYuanMoEV1ForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float16", "torch.float32"}
    result = proof(EngineModel(model), expected, "placement")
    assert result.passed, result.reason
    model.model.norm.to(torch.float32)
    assert [f.name for f in proof(EngineModel(model), expected, "placement").findings] == ["model.norm.weight"]


def test_bfloat16_keeps_only_what_is_listed_strictly() -> None:
    """transformers upcasts its plain list for float16 only; the proof follows it."""
    model = SimpleNamespace(_keep_in_fp32_modules={"wo"}, _keep_in_fp32_modules_strict={"experts.*.bias"})
    half, brain, full = (fp32_exceptions(model, dtype) for dtype in ("float16", "bfloat16", "float32"))
    assert (half("block.wo.weight"), brain("block.wo.weight")) == (True, False)
    assert brain("experts.3.bias")
    assert not full("experts.3.bias")


def test_an_untied_model_needs_no_tie(load: Load, expected: Expected, proof: Prove, tmp_path: Path) -> None:
    """Qwen2.5-7B and its like have a head of their own; that is no fault."""
    tiny_qwen2(tie=False).save_pretrained(tmp_path)
    assert proof(load(tmp_path), expected, "placement").passed


def test_a_checkpoint_with_two_heads_and_a_config_that_ties_them_is_named(
    load: Load, expected: Expected, proof: Prove, tmp_path: Path
) -> None:
    """transformers only logs that it will not tie; here the contradiction is said, with its cure."""
    tiny_qwen2(tie=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    result = proof(load(tmp_path), expected, "placement")
    assert [finding.kind for finding in result.findings] == ["tie"]
    assert "tie_word_embeddings=false" in result.reason


def test_a_generation_config_that_was_not_taken_up_is_found(
    load: Load, expected: Expected, proof: Prove, tmp_path: Path
) -> None:
    """A model that lost its end-of-sequence ids speaks on and on, and nothing else shows it."""
    tiny_qwen2(tie=True).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9], "repetition_penalty": 1.05}')
    stored = stored_generation_config(tmp_path)
    asked = replace(expected, generation_config=stored)
    loaded = load(tmp_path)
    assert proof(loaded, asked, "placement").passed
    loaded.model.generation_config.eos_token_id = None
    result = proof(loaded, asked, "placement")
    assert result.findings[0].kind == "generation_config"
    assert "eos_token_id is None, the checkpoint has [7, 9]" in result.reason


def test_a_generation_config_that_cannot_be_read_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    """The user hears which file is damaged; one that is not there is no damage."""
    assert stored_generation_config(tmp_path) is None
    (tmp_path / "generation_config.json").write_text("[1, 2")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid"):
        stored_generation_config(tmp_path)


def test_keys_that_did_not_fit_are_findings(load: Load, expected: Expected, proof: Prove) -> None:
    """Wrong shapes and left-over tensors are as bad as missing ones."""
    loaded = load()
    loaded.mismatched_keys.append("model.norm.weight")
    loaded.unexpected_keys.append("model.extra.weight")
    kinds = [finding.kind for finding in proof(loaded, expected, "placement").findings]
    assert kinds == ["mismatched_key", "unexpected_key"]


@pytest.mark.parametrize(
    ("place", "name"), [(0, "cuda:0"), ("1", "cuda:1"), ("cuda", "cuda:0"), (torch.device("cpu"), "cpu")]
)
def test_places_are_compared_by_one_spelling(place: Any, name: str) -> None:
    """accelerate says 0 where torch says cuda:0: both are the same GPU."""
    assert device_name(place) == name


def test_a_strategy_may_use_several_gpus_and_each_module_is_held_to_its_own() -> None:
    """`device_map=auto` over two GPUs is legitimate; a layer on the other one than its map says is not."""
    loaded = EngineModel(SimpleNamespace(), {"model.layers.0": "0", "model.layers.1": "1", "lm_head": "1"})
    asked = Expected("cuda:0", "float16", single_device=False, offload_allowed=False)
    places = ResolvedDeviceMap(loaded, asked)
    assert places.find_refused() == []
    assert places.allowed_devices("model.layers.1.mlp.up_proj", offloaded=False) == {"cuda:1"}
    assert places.allowed_devices("model.layers.0", offloaded=False) == {"cuda:0"}
    one = ResolvedDeviceMap(loaded, replace(asked, single_device=True))
    assert [(finding.kind, finding.name) for finding in one.find_refused()] == [
        ("device", "model.layers.1"),
        ("device", "lm_head"),
    ]


def test_host_memory_is_offload_on_a_gpu_run_only() -> None:
    """`cpu` in a device map is the goal of a CPU run and a silent offload of a GPU run."""
    loaded = EngineModel(SimpleNamespace(), {"model": "0", "lm_head": "cpu"})
    asked = Expected("cuda:0", "float16", single_device=False, offload_allowed=False)
    assert [finding.kind for finding in ResolvedDeviceMap(loaded, asked).find_refused()] == ["offload"]
    assert ResolvedDeviceMap(loaded, replace(asked, offload_allowed=True)).find_refused() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_model_on_the_gpu_passes_and_a_stray_tensor_is_named(load: Load, expected: Expected, proof: Prove) -> None:
    """On a real GPU the proof passes what is right and names the one tensor that stayed behind."""
    asked = replace(expected, device="cuda:0")
    loaded = load(device_map="cuda:0")
    assert proof(loaded, asked, "placement").passed
    loaded.model.model.norm.to("cpu")
    assert [f.name for f in proof(loaded, asked, "placement").findings] == ["model.norm.weight"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_host_offload_of_a_gpu_run_is_found(load: Load, expected: Expected, proof: Prove) -> None:
    """accelerate's offload to host memory is found on a GPU run, and accepted where it was allowed."""
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places: dict[str, Any] = dict.fromkeys(names, 0) | {f"model.layers.{n}": "cpu" if n > 9 else 0 for n in range(12)}
    loaded = load(device_map=places)
    asked = replace(expected, device="cuda:0", single_device=False)
    assert {f.kind for f in proof(loaded, asked, "placement").findings} == {"offload"}
    result = proof(loaded, replace(asked, offload_allowed=True), "placement")
    assert result.passed, result.reason
