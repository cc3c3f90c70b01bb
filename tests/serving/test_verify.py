"""`ladezeit.verify` tells whether a model in memory is its checkpoint's, whoever loaded it and whatever befell it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from known_models import Known
from transformers import AutoModelForCausalLM

import ladezeit
from ladezeit.errors import CheckpointError, ConfigError, NotRunnableError


@pytest.fixture
def model(known: dict[str, Known]) -> Any:
    """As a service loads it that knows nothing of us."""
    return AutoModelForCausalLM.from_pretrained(known["ape"].folder)


@pytest.mark.parametrize("level", ["placement", "content", "logits", "full"])
def test_a_model_that_somebody_else_loaded_passes(
    model: Any, known: dict[str, Known], level: str, warm_references: None
) -> None:
    found = ladezeit.verify(model, known["ape"].folder, level=level)
    assert found.passed and found.ran and not found.findings and found.level == level
    assert found.total_s > 0


def test_what_load_returned_is_taken_as_well(known: dict[str, Known], warm_references: None) -> None:
    """After a day in memory: generating leaves the weights as they are."""
    loaded = ladezeit.load(known["ape"].folder, device="cpu")
    loaded.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    assert ladezeit.verify(loaded, known["ape"].folder, device="cpu").passed


def test_one_flipped_bit_is_found_by_name(model: Any, known: dict[str, Known], warm_references: None) -> None:
    name, weight = list(model.named_parameters())[3]
    weight.data.view(torch.int16).view(-1)[5] ^= 1
    found = ladezeit.verify(model, known["ape"].folder)
    assert not found.passed
    assert [(finding.kind, finding.name) for finding in found.findings] == [("content", name)]
    assert ladezeit.verify(model, known["ape"].folder, level="placement").passed, "which does not read values"


def test_an_adapter_that_was_not_taken_out_exactly_is_found(
    model: Any, known: dict[str, Known], warm_references: None
) -> None:
    """Adding a product to bfloat16 weights and taking it away again need not give the weights back."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    update = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.no_grad():
        weight += update
        weight -= update
    (finding,) = ladezeit.verify(model, known["ape"].folder).findings
    assert finding.name == "model.layers.0.self_attn.q_proj.weight"


def test_another_checkpoint_of_the_same_layout_is_told_apart(
    model: Any, known: dict[str, Known], warm_references: None
) -> None:
    """A service that mixed up two folders serves the wrong model without any error."""
    found = ladezeit.verify(model, known["bee"].folder)
    assert not found.passed
    assert {finding.kind for finding in found.findings} == {"content"}
    assert len(found.findings) >= len(list(model.parameters())) - 5, "constant norms are alike"


def test_a_dtype_is_the_checkpoints_unless_another_is_named(known: dict[str, Known], warm_references: None) -> None:
    half = AutoModelForCausalLM.from_pretrained(known["ape"].folder, dtype=torch.float16)
    found = ladezeit.verify(half, known["ape"].folder)
    assert {finding.kind for finding in found.findings} == {"dtype"}
    assert ladezeit.verify(half, known["ape"].folder, dtype="float16").passed


def test_a_cast_of_the_whole_model_is_not_the_load_in_that_dtype(
    model: Any, known: dict[str, Known], warm_references: None
) -> None:
    """`model.to(float16)` rounds the rotary frequencies too, which `from_pretrained(dtype=float16)` keeps exact."""
    found = ladezeit.verify(model.to(torch.float16), known["ape"].folder, dtype="float16").findings
    assert {(finding.kind, finding.name) for finding in found} == {
        ("dtype", "model.rotary_emb.inv_freq"),
        ("dtype", "model.rotary_emb.original_inv_freq"),
    }


def test_offloaded_weights_are_fetched_and_read(known: dict[str, Known], tmp_path: Path, warm_references: None) -> None:
    """Without a device, weights may be anywhere; with one, what lies elsewhere is found."""
    placed = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    placed["model.rotary_emb"] = "cpu"
    model = AutoModelForCausalLM.from_pretrained(known["ape"].folder, device_map=placed, offload_folder=str(tmp_path))
    assert ladezeit.verify(model, known["ape"].folder).passed
    found = ladezeit.verify(model, known["ape"].folder, device="cpu")
    assert {finding.kind for finding in found.findings} == {"offload"}


def test_a_quantized_model_is_held_against_its_quantizer(known: dict[str, Known]) -> None:
    """Scheme and codes are read off the model: nobody has to say how it was loaded."""
    pytest.importorskip("torchao")
    loaded = ladezeit.load(known["ape"].folder, loading="torchao_int8", device="cpu")
    found = ladezeit.verify(loaded.model, known["ape"].folder)
    assert found.passed, found.reason
    assert found.claim is not None and "codes and scales" in found.claim
    weight = loaded.model.model.layers[0].mlp.up_proj.weight
    weight.qdata[0, 0] ^= 1
    (finding,) = ladezeit.verify(loaded.model, known["ape"].folder).findings
    assert finding.name.startswith("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"level": "none"}, "level=none verifies nothing"),
        ({"level": "contents"}, "Did you mean 'content'"),
        ({"dtype": "bf16"}, r"dtype=bf16 is none of auto, float32"),
        ({"checkpoint": "org/"}, "neither configured"),
        ({"model": torch.nn.Linear(1, 1)}, r"takes a transformers model .* got torch.nn.modules.linear.Linear"),
    ],
)
def test_what_means_nothing_is_one_clear_error(
    model: Any, known: dict[str, Known], arguments: dict[str, Any], says: str
) -> None:
    asked = {"model": model, "checkpoint": known["ape"].folder} | arguments
    with pytest.raises(ConfigError, match=says):
        ladezeit.verify(asked.pop("model"), asked.pop("checkpoint"), **asked)


def test_a_quantizer_without_a_reference_is_refused(model: Any, known: dict[str, Known]) -> None:
    """Not passed, and not called wrong either."""
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(NotRunnableError, match="no reference load here repeats"):
        ladezeit.verify(model, known["ape"].folder)


def test_a_damaged_checkpoint_verifies_nothing(model: Any, known: dict[str, Known], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(known["ape"].folder, tmp_path / "cut"))
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        ladezeit.verify(model, folder)
