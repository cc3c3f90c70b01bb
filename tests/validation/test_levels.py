"""What each validation level finds and what it knowingly does not: the table users choose a level by."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from safetensors.torch import load_file, save_file

from ladezeit.loading.base import EngineModel
from ladezeit.validation.expected import Expected
from ladezeit.validation.verification import Verification

LEVELS = ("none", "sampled", "all_modules", "origin_rule", "placement")
Load = Callable[..., EngineModel]
Prove = Callable[..., Verification]
MIDDLE = "model.layers.6.mlp.up_proj"


def put_on_meta(model: Any, module: str) -> None:
    held = model.get_submodule(module)
    held.weight = torch.nn.Parameter(held.weight.to("meta"))


def sound(load: Load, tmp_path: Path) -> EngineModel:
    return load()


def meta_in_the_middle(load: Load, tmp_path: Path) -> EngineModel:
    loaded = load()
    put_on_meta(loaded.model, MIDDLE)
    return loaded


def meta_in_the_first_modules(load: Load, tmp_path: Path) -> EngineModel:
    loaded = load()
    put_on_meta(loaded.model, "model.layers.0.self_attn.q_proj")
    return loaded


def buffer_on_meta(load: Load, tmp_path: Path) -> EngineModel:
    loaded = load()
    rotary = loaded.model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.to("meta")
    return loaded


def wrong_dtype(load: Load, tmp_path: Path) -> EngineModel:
    loaded = load()
    loaded.model.get_submodule(MIDDLE).to(torch.float32)
    return loaded


def untied_head(load: Load, tmp_path: Path) -> EngineModel:
    loaded = load()
    head = loaded.model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return loaded


def offloaded_by_its_map(load: Load, tmp_path: Path) -> EngineModel:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{number}": "disk" if number == 6 else "cpu" for number in range(12)}
    return load(device_map=places, offload_folder=str(tmp_path / "offload"))


def offloaded_by_a_hook(load: Load, tmp_path: Path) -> EngineModel:
    loaded = load()
    disk_offload(loaded.model.model.layers[6], str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    return loaded


def missing_key(load: Load, tmp_path: Path) -> EngineModel:
    loaded = load()
    folder = tmp_path / "damaged"
    loaded.model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{MIDDLE}.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return load(folder)


def no_generation_config(load: Load, tmp_path: Path) -> EngineModel:
    loaded = load()
    loaded.model.generation_config = None
    return loaded


Fault = Callable[[Load, Path], EngineModel]

#: Which levels find a fault, and as what. A level that is not named does not find it, and is not claimed to.
FOUND: list[tuple[Fault, dict[str, str]]] = [
    (sound, {}),
    (meta_in_the_middle, {"all_modules": "meta", "placement": "meta"}),
    (
        meta_in_the_first_modules,
        {"sampled": "meta", "all_modules": "meta", "placement": "meta"},
    ),
    (buffer_on_meta, {"sampled": "meta", "all_modules": "meta", "placement": "meta"}),
    (wrong_dtype, {"placement": "dtype"}),
    (untied_head, {"placement": "tie"}),
    (offloaded_by_its_map, {"all_modules": "meta", "placement": "offload"}),
    (offloaded_by_a_hook, {"all_modules": "meta", "placement": "offload"}),
    (missing_key, {"placement": "missing_key"}),
    (no_generation_config, {"placement": "generation_config"}),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("fault", "found"), FOUND, ids=[fault.__name__ for fault, _ in FOUND])
def test_a_level_finds_what_it_claims_and_no_more(
    *, fault: Fault, found: dict[str, str], level: str, load: Load, expected: Expected, proof: Prove, tmp_path: Path
) -> None:
    """A user who reads that a level finds a fault can rely on it, and on the reason naming it."""
    result = proof(fault(load, tmp_path), expected, level)
    assert {finding.kind for finding in result.findings} == ({found[level]} if level in found else set())
    assert result.ran == (level not in ("none", "origin_rule"))
    assert result.passed == (result.ran and level not in found)
    if level in found:
        assert found[level] in result.reason


@pytest.mark.parametrize("level", ["none", "origin_rule"])
def test_a_level_that_did_not_run_proves_nothing(level: str, load: Load, expected: Expected, proof: Prove) -> None:
    """A load that nobody looked at is never shown as proven."""
    result = proof(load(), expected, level)
    assert not result.passed
    assert (result.modules_seen, result.tensors_seen) == (0, 0)
    assert "nothing was looked at" in result.reason


def test_origin_rule_samples_where_the_placement_is_left_to_a_strategy(
    load: Load, expected: Expected, proof: Prove
) -> None:
    """The origin case's rule is reproduced: only `device_map=cuda` skips the check."""
    loaded = load(device_map="auto")
    put_on_meta(loaded.model, "model.layers.0.self_attn.q_proj")
    result = proof(loaded, replace(expected, single_device=False), "origin_rule")
    assert result.ran
    assert [finding.name for finding in result.findings] == ["model.layers.0.self_attn.q_proj.weight"]


def test_sampled_says_how_little_it_looked_at(load: Load, expected: Expected, proof: Prove) -> None:
    """`k` means modules from each end, and the reason says how many were left out."""
    loaded = load()
    modules = len(list(loaded.model.named_modules()))
    result = proof(loaded, expected, "sampled", k=3)
    assert result.modules_seen == 6
    assert f"6 of {modules} modules" in result.reason
    everything = proof(loaded, expected, "sampled", k=1000)
    assert everything.modules_seen == modules


def test_all_modules_looks_again_for_every_module_above(load: Load, expected: Expected, proof: Prove) -> None:
    """The cost that the origin case paid is kept, so that it can be measured: more looks than there are tensors."""
    loaded = load()
    walked, once = proof(loaded, expected, "all_modules"), proof(loaded, expected, "placement")
    assert walked.modules_seen == once.modules_seen == len(list(loaded.model.named_modules()))
    assert walked.tensors_seen > 4 * once.tensors_seen


def test_placement_counts_each_tensor_once(load: Load, expected: Expected, proof: Prove) -> None:
    """A tied head is one tensor in memory and counts as one."""
    loaded = load()
    unique = {id(t) for t in (*loaded.model.parameters(), *loaded.model.buffers())}
    assert proof(loaded, expected, "placement").tensors_seen == len(unique)


def test_the_proof_says_what_it_cost_and_becomes_plain_data(load: Load, expected: Expected, proof: Prove) -> None:
    """The result file holds the proof with its cost and every finding."""
    loaded = load()
    put_on_meta(loaded.model, MIDDLE)
    plain = proof(loaded, expected, "placement").to_dict()
    assert plain["level"] == "placement"
    assert plain["total_s"] > 0
    assert plain["findings"][0]["name"] == f"{MIDDLE}.weight"


def test_all_findings_are_kept_and_the_first_ten_are_named(load: Load, expected: Expected, proof: Prove) -> None:
    """A model loaded in the wrong dtype throughout gives a reason one can read, and a complete list."""
    result = proof(load(dtype="float32"), expected, "placement")
    assert len(result.findings) > 100
    assert {finding.kind for finding in result.findings} == {"dtype"}
    assert result.reason.endswith(f"and {len(result.findings) - 10} more")
