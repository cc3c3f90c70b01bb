"""What the proof finds in a quantised model: what is not quantised, what should not be, what was lost on the way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import DType
from quantized_loads import ENGINES, UP, linear_weights, load, proof, scheme


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype", [DType.float16, DType.float32])
def test_what_is_kept_has_the_dtype_that_was_asked(name: str, dtype: DType, tiny: Checkpoint, tmp_path: Path) -> None:
    loaded = load(name, tiny, tmp_path, dtype=dtype)
    assert proof(loaded, scheme(name), dtype=dtype.value).passed
    assert {finding.kind for finding in proof(loaded, scheme(name)).findings} == {"dtype"}


def plain_weight(model: Any) -> None:
    module = model.get_submodule(UP)
    weight = torch.zeros(module.out_features, module.in_features, dtype=torch.bfloat16)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)


def plain_module(model: Any) -> None:
    old = model.get_submodule(UP)
    model.set_submodule(UP, torch.nn.Linear(old.in_features, old.out_features, bias=False, dtype=torch.bfloat16))


def raw_codes(model: Any) -> None:
    module = model.get_submodule(UP)
    codes = torch.zeros(module.out_features, module.in_features, dtype=torch.int8)
    module.weight = torch.nn.Parameter(codes, requires_grad=False)


def weight_on_meta(model: Any) -> None:
    module = model.get_submodule(UP)
    module.weight = torch.nn.Parameter(torch.empty(1, device="meta"), requires_grad=False)


def kept_in_another_dtype(model: Any) -> None:
    model.model.norm.to(torch.float32)


def untied_head(model: Any) -> None:
    head = model.get_submodule("lm_head")
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


FAULTS: dict[Callable[[Any], None], tuple[str, str]] = {
    plain_weight: ("quantisation", f"{UP}.weight"),
    plain_module: ("quantisation", f"{UP}.weight"),
    raw_codes: ("quantisation", f"{UP}.weight"),
    weight_on_meta: ("meta", f"{UP}.weight"),
    kept_in_another_dtype: ("dtype", "model.norm.weight"),
    untied_head: ("tie", "lm_head.weight"),
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(name: str, fault: Callable[[Any], None], tiny: Checkpoint, tmp_path: Path) -> None:
    """One weight that is not what was asked for makes the sample wrong, and it is named."""
    loaded = load(name, tiny, tmp_path)
    fault(loaded.model)
    assert FAULTS[fault] in [(finding.kind, finding.name) for finding in proof(loaded, scheme(name)).findings]


@pytest.mark.parametrize("name", ENGINES)
def test_a_lost_part_is_found(name: str, tiny: Checkpoint, tmp_path: Path) -> None:
    """Codes without their scales are worth nothing, and the weight itself looks whole."""
    loaded = load(name, tiny, tmp_path)
    weight = loaded.model.get_submodule(UP).weight
    owner, scales = {
        "bitsandbytes_8bit": (weight, "SCB"),
        "bitsandbytes_4bit": (getattr(weight, "quant_state", None), "absmax"),
        "torchao_int8": (weight, "scale"),
    }[name]
    setattr(owner, scales, getattr(owner, scales).to("meta"))
    assert [(f.kind, f.name) for f in proof(loaded, scheme(name)).findings] == [("meta", f"{UP}.weight")]


@pytest.mark.parametrize("name", ENGINES)
def test_a_head_that_the_quantizer_leaves_out_must_not_be_quantized(
    name: str, tiny: Checkpoint, tmp_path: Path
) -> None:
    loaded = load(name, tiny, tmp_path)
    module = loaded.model.get_submodule(UP)
    loaded.model.lm_head.weight = module.weight
    module.weight = torch.nn.Parameter(module.weight.data.clone(), requires_grad=False)
    details = [finding.detail for finding in proof(loaded, scheme(name)).findings]
    assert any("the quantizer's own rule leaves it out" in detail for detail in details)


@pytest.mark.parametrize("name", ENGINES)
def test_quantized_unasked_is_wrong(name: str, tiny: Checkpoint, tmp_path: Path) -> None:
    """A load that saves memory behind one's back gives other answers than the model that was asked for."""
    found = proof(load(name, tiny, tmp_path), None)
    assert len(found.findings) == len(linear_weights(load("transformers", tiny, tmp_path, device_map="cpu").model))
    assert f"is {scheme(name)}, which was not asked" in found.reason


def test_an_unquantized_model_is_not_what_was_asked(tiny: Checkpoint, tmp_path: Path) -> None:
    """Nor is one whose quantiser never ran."""
    loaded = load("transformers", tiny, tmp_path, device_map="cpu")
    assert [f.detail for f in proof(loaded, "bitsandbytes 8 bit").findings] == [
        "no tensor is bitsandbytes 8 bit, which was asked"
    ]
    raw_codes(loaded.model)
    assert [f.detail for f in proof(loaded, None).findings] == ["is int8 without scales, which was not asked"]


@pytest.mark.gpu
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", ENGINES)
def test_on_a_gpu_a_planted_fault_is_found(
    name: str, fault: Callable[[Any], None], tiny: Checkpoint, tmp_path: Path
) -> None:
    loaded = load(name, tiny, tmp_path, "cuda:0")
    fault(loaded.model)
    assert {FAULTS[fault][1]} <= {finding.name for finding in proof(loaded, scheme(name), "cuda:0").findings}
