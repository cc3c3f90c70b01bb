"""The level `content` for quantised loads: codes and scales are those that the quantiser makes of the checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from proven_checkpoints import manifest_of
from transformers import GPT2Config, GPT2LMHeadModel

from configs_for_tests import TINY_MOE, make_run_config, model_config
from ladezeit.checkpoint.resolve import Checkpoint, inspect_checkpoint, prepare_checkpoint
from ladezeit.config import ValidationConfig, ValidationLevel
from ladezeit.errors import CheckpointError
from ladezeit.loading.base import EngineModel
from ladezeit.loading.engines.quantized import FourBitType
from ladezeit.loading.quantization import loading_scheme
from ladezeit.results.records import Identity, Status
from ladezeit.runner.spec import WorkerSpec
from ladezeit.runner.supervisor import Supervisor
from ladezeit.timing.clock import Clock
from ladezeit.validation import manifest, references
from ladezeit.validation.expected import Expected
from ladezeit.validation.levels import verify_model
from ladezeit.validation.references import reference_key_of
from ladezeit.validation.verification import Verification
from quantized_loads import ENGINES, UP, load, loading_of

OTHER = "model.layers.1.mlp.up_proj"
#: Each method with its arguments, and the attribute that holds the scales of its weights.
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bitsandbytes_8bit": ("bitsandbytes_8bit", {}, "SCB"),
    "bitsandbytes_4bit": ("bitsandbytes_4bit", {}, "absmax"),
    "bitsandbytes_4bit fp4 double": (
        "bitsandbytes_4bit",
        {"quant_type": FourBitType.fp4, "double_quant": True},
        "absmax",
    ),
    "torchao_int8": ("torchao_int8", {}, "scale"),
}


def proven(loaded: EngineModel, file: Path, method: str, dtype: str = "bfloat16") -> Verification:
    name, arguments, _ = METHODS[method]
    asked = loading_scheme(loading_of(name, **arguments))
    assert asked is not None
    expected = Expected(
        "cpu", dtype, single_device=True, offload_allowed=False, quantization=asked.words,
        manifest=manifest.read_manifest(file),
    )  # fmt: skip
    return verify_model(loaded, expected, ValidationConfig(ValidationLevel.content), Clock(0))


def file_of(checkpoint: Checkpoint, cache: Path, method: str, dtype: str = "bfloat16") -> Path:
    name, arguments, _ = METHODS[method]
    pytest.importorskip(ENGINES[name])
    return manifest_of(checkpoint, cache, dtype, scheme=loading_scheme(loading_of(name, **arguments)))


def found(proof: Verification) -> set[tuple[str, str]]:
    return {(finding.kind, finding.name) for finding in proof.findings}


def scales_of(weight: Any, method: str) -> tuple[Any, str]:
    attribute = METHODS[method][2]
    return (getattr(weight, "quant_state", None) or weight, attribute)


@pytest.mark.parametrize("method", METHODS)
def test_a_right_load_is_proven_and_says_what_that_means(
    method: str, tiny: Checkpoint, cache: Path, tmp_path: Path
) -> None:
    """Every part of every weight, and the claim names the library, the scheme, and what is not proven."""
    name, arguments, _ = METHODS[method]
    file = file_of(tiny, cache, method)
    proof = proven(load(name, tiny, tmp_path, **arguments), file, method)
    assert proof.passed, proof.reason
    assert proof.claim is not None
    assert f"the codes and scales of 28 weights are bit for bit those that {ENGINES[name]} " in proof.claim
    assert "how close the quantized weights are to the original is not verified" in proof.claim
    said = manifest.read_manifest(file)
    kinds = [entry.kind for entry in said.tensors.values()]
    assert kinds.count("quantised") == 28 * len({n.partition(":")[2] for n in said.tensors if n.startswith(UP)})
    assert said.unanchored == []


def flipped_code(model: Any, method: str) -> set[tuple[str, str]]:
    weight = model.get_submodule(UP).weight
    codes = getattr(weight, "qdata", weight.data)
    codes.view(torch.uint8).view(-1)[77] ^= 1
    return {("content", f"{UP}.weight{':qdata' if hasattr(weight, 'qdata') else ''}")}


def swapped_scales(model: Any, method: str) -> set[tuple[str, str]]:
    """The scales of one weight under the codes of another: right bytes, wrong place."""
    one, attribute = scales_of(model.get_submodule(UP).weight, method)
    other, _ = scales_of(model.get_submodule(OTHER).weight, method)
    kept = getattr(one, attribute).clone()
    getattr(one, attribute).copy_(getattr(other, attribute))
    getattr(other, attribute).copy_(kept)
    part = f"state.{attribute}" if attribute == "absmax" else attribute
    return {("content", f"{name}.weight:{part}") for name in (UP, OTHER)}


def nudged_scale(model: Any, method: str) -> set[tuple[str, str]]:
    owner, attribute = scales_of(model.get_submodule(UP).weight, method)
    getattr(owner, attribute).view(torch.uint8).view(-1)[4] ^= 1
    part = f"state.{attribute}" if attribute == "absmax" else attribute
    return {("content", f"{UP}.weight:{part}")}


def flipped_bit_of_a_norm(model: Any, method: str) -> set[tuple[str, str]]:
    model.model.norm.weight.data.view(torch.int16)[3] ^= 1
    return {("content", "model.norm.weight")}


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_fault_is_found(method: str, tiny: Checkpoint, cache: Path, tmp_path: Path) -> None:
    """One code, one scale, scales under the wrong weight, a bit of what was kept: named, and nothing else."""
    name, arguments, _ = METHODS[method]
    loaded, file = load(name, tiny, tmp_path, **arguments), file_of(tiny, cache, method)
    for fault in (flipped_code, swapped_scales, nudged_scale, flipped_bit_of_a_norm):
        wanted = fault(loaded.model, method)
        proof = proven(loaded, file, method)
        assert found(proof) == wanted
        assert proof.claim is None
        fault(loaded.model, method)  # each undoes itself
    assert proven(loaded, file, method).passed


def test_the_finding_says_whose_scales_they_are(tiny: Checkpoint, cache: Path, tmp_path: Path) -> None:
    """Somebody who looks for the cause is told what the bytes should be made by, and where they belong."""
    loaded = load("bitsandbytes_8bit", tiny, tmp_path)
    swapped_scales(loaded.model, "bitsandbytes_8bit")
    reason = proven(loaded, file_of(tiny, cache, "bitsandbytes_8bit"), "bitsandbytes_8bit").reason
    assert f"makes of what the checkpoint holds: it is that of {OTHER}.weight:SCB" in reason


def test_another_scheme_is_not_what_was_asked(tiny: Checkpoint, cache: Path, tmp_path: Path) -> None:
    """4 bit by another code book: same shapes, other codes and another book."""
    loaded = load("bitsandbytes_4bit", tiny, tmp_path, quant_type=FourBitType.fp4)
    proof = proven(loaded, file_of(tiny, cache, "bitsandbytes_4bit"), "bitsandbytes_4bit")
    assert {kind for kind, _ in found(proof)} == {"quantisation", "content"}
    assert ("content", f"{UP}.weight:state.code") in found(proof)


def test_a_used_model_is_proven_as_well(tiny: Checkpoint, cache: Path, tmp_path: Path) -> None:
    """bitsandbytes moves its scales at the first forward: they are looked for where they went."""
    loaded = load("bitsandbytes_8bit", tiny, tmp_path)
    loaded.model(torch.tensor([[1, 2, 3]]))
    file = file_of(tiny, cache, "bitsandbytes_8bit")
    assert proven(loaded, file, "bitsandbytes_8bit").passed
    loaded.model.get_submodule(UP).state.SCB[3] *= 2
    assert found(proven(loaded, file, "bitsandbytes_8bit")) == {("content", f"{UP}.weight:SCB")}


@pytest.mark.parametrize("method", ["bitsandbytes_4bit", "torchao_int8"])
def test_what_is_cast_first_is_quantized_from_the_cast(
    method: str, tiny: Checkpoint, cache: Path, tmp_path: Path
) -> None:
    """The quantiser meets the weights in the dtype that was asked for, not in the file's."""
    from ladezeit.config import DType

    loaded = load(METHODS[method][0], tiny, tmp_path, dtype=DType.float16)
    proof = proven(loaded, file_of(tiny, cache, method, "float16"), method, "float16")
    assert proof.passed, proof.reason


@pytest.fixture(scope="module")
def others(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """A mixture of experts, and a model whose weights lie the other way round."""
    experts = model_config("tiny")
    experts.name, experts.architecture = "tiny-experts", TINY_MOE
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=128, n_positions=32))
    gpt2.to(torch.bfloat16).save_pretrained(folder)
    return {"experts": prepare_checkpoint(experts, cache), "gpt2": inspect_checkpoint(folder, "gpt2")}


@pytest.mark.parametrize(
    ("kind", "method"), [("experts", "torchao_int8"), ("experts", "bitsandbytes_4bit"), ("gpt2", "bitsandbytes_8bit")]
)
def test_other_architectures_are_proven(
    kind: str, method: str, others: dict[str, Checkpoint], cache: Path, tmp_path: Path
) -> None:
    """Merged experts stay plain beside quantised attention; weights of GPT-2 are transposed, then quantised."""
    checkpoint = others[kind]
    proof = proven(load(METHODS[method][0], checkpoint, tmp_path), file_of(checkpoint, cache, method), method)
    assert proof.passed, proof.reason


def test_a_quantizer_that_does_not_repeat_itself_is_found_out(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes that differ between two times prove nothing: said with what to use instead, never proven by luck."""
    from transformers import AutoModelForCausalLM

    asked = loading_scheme(loading_of("bitsandbytes_8bit"))
    assert asked is not None
    pytest.importorskip("bitsandbytes")
    right = manifest.quantize_weight

    def dithered(*arguments: Any) -> dict[str, torch.Tensor]:
        parts = right(*arguments)
        return {**parts, "": parts[""] + torch.randint(0, 2, parts[""].shape, dtype=torch.int8)}

    monkeypatch.setattr(manifest, "quantize_weight", dithered)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"makes other codes .* \(28 of 28: .*Use validation=logits"):
        manifest.quantized_entries(model, asked, "bfloat16", "cpu")


@pytest.mark.parametrize(
    ("engine", "wanted"),
    [("bitsandbytes_4bit", Status.ok), ("engines_for_tests:FlipsACode", Status.wrong)],
)
def test_a_worker_proves_a_quantized_load_in_full(
    *, engine: str, wanted: Status, tiny: Checkpoint, cache: Path, tmp_path: Path, supervisor: Supervisor
) -> None:
    """Contents, then logits against the same method's own reference; the result says what was proven."""
    pytest.importorskip("bitsandbytes")
    loading = loading_of("bitsandbytes_4bit")
    loading.engine = engine
    config = make_run_config(tmp_path, validation=ValidationConfig(ValidationLevel.full), loading=loading)
    files = references.prepare_references(
        config, reference_key_of(config, tiny, device="cpu", hardware="this", cache=cache)
    )
    own = tmp_path / "sample"
    own.mkdir()
    identity = Identity("p", 0, 0, "test", [], "command")
    spec = WorkerSpec(config, tiny, identity, "cpu", own, manifest=files.manifest, reference=files.reference)
    result = supervisor.run_sample(spec)
    assert result.status is wanted, result.reason
    assert result.proof is not None
    if wanted is Status.ok:
        assert "(bitsandbytes 4 bit nf4) makes of the checkpoint's" in result.proof["claim"]
        assert "what another load by the same quantizer generates" in result.proof["claim"]
        assert result.metrics["validation/tokens_equal"] == 1
    else:
        findings = json.loads((own / "findings.json").read_text())
        assert [(one["kind"], one["name"]) for one in findings] == [("content", f"{UP}.weight")]
        assert result.proof["claim"] is None


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_codes_are_those_that_its_kernels_make(
    method: str, tiny: Checkpoint, cache: Path, tmp_path: Path
) -> None:
    """The measure is made where the load quantises: another device may round otherwise."""
    name, arguments, _ = METHODS[method]
    pytest.importorskip(ENGINES[name])
    asked = loading_scheme(loading_of(name, **arguments))
    assert asked is not None
    file = manifest_of(tiny, cache, scheme=asked, device="cuda:0")
    loaded = load(name, tiny, tmp_path, "cuda:0", **arguments)
    given: Any = {"single_device": True, "offload_allowed": False}
    expected = Expected("cuda:0", "bfloat16", quantization=asked.words, manifest=manifest.read_manifest(file), **given)
    proof = verify_model(loaded, expected, ValidationConfig(ValidationLevel.content), Clock(0))
    assert proof.passed, proof.reason
    assert flipped_code(loaded.model, method) == found(
        verify_model(loaded, expected, ValidationConfig(ValidationLevel.content), Clock(0))
    )
