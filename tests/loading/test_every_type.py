"""Every type of model that `AutoModelForCausalLM` knows, loaded by each engine as plain `from_pretrained` loads it."""

from pathlib import Path

import pytest
from plain_loads import differences, installed_engines, load_by, load_plainly
from tiny_configs import NOT_TINY, tiny_model

from ladezeit.errors import LadezeitError

#: Text parts of larger models, larger models themselves, experts, and plain ones.
_SOME = ("qwen3_5", "qwen3_5_moe", "llama4", "mllama", "emu3", "gemma3", "qwen3_moe", "mamba2", "gpt2")


def _wrong(model_type: str, folder: Path) -> list[str]:
    """Return what engines make other than plain `from_pretrained` does."""
    tiny_model(model_type).save_pretrained(folder)
    plain, info = load_plainly(folder)
    made_up = bool(info["missing_keys"] or info["mismatched_keys"])
    wrong = []
    for engine in installed_engines():
        try:
            loaded = load_by(engine, folder)
        except LadezeitError as refusal:
            wrong += [] if made_up else [f"{model_type} by {engine}: refused: {refusal}"]
        except Exception as error:
            wrong.append(f"{model_type} by {engine}: {type(error).__name__}: {error}")
        else:
            if made_up:
                wrong += [] if loaded.missing_keys else [f"{model_type} by {engine}: values are made up in silence"]
                continue
            wrong += [f"{model_type} by {engine}: {one}" for one in differences(loaded.model, plain)]
            wrong += [f"{model_type} by {engine}: unexpected {name}" for name in loaded.unexpected_keys]
    return wrong


@pytest.mark.parametrize("model_type", _SOME)
def test_a_type_is_loaded_as_from_pretrained_loads_it(model_type: str, tmp_path: Path) -> None:
    """Whatever engine a verdict chose, the model is the one that the library would have made, or a refusal."""
    assert _wrong(model_type, tmp_path / model_type) == []


@pytest.mark.slow
def test_every_type_is_loaded_as_from_pretrained_loads_it(tmp_path: Path) -> None:
    """No type of model is loaded other than the library loads it, and none ends in an error without advice."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = [one for one in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if one not in (*NOT_TINY, *_SOME)]
    assert [wrong for one in types for wrong in _wrong(one, tmp_path / one)] == []
