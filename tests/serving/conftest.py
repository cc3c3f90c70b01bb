"""Three models that say different things, and what each says when it is loaded by nothing but `from_pretrained`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from known_models import Known, says

from configs_for_tests import model_config


@pytest.fixture(scope="session")
def known(cache: Path) -> dict[str, Known]:
    """Checkpoints of 6 MB with other weights each, by name."""
    from transformers import AutoModelForCausalLM

    from ladezeit.checkpoint.resolve import prepare_checkpoint

    found = {}
    for seed, name in enumerate(("ape", "bee", "cat"), start=21):
        config = model_config("tiny")
        config.name, config.seed = name, seed
        config.architecture = {**config.architecture, "tie_word_embeddings": False}  # a tied one repeats its input
        checkpoint = prepare_checkpoint(config, cache)
        tokens = says(AutoModelForCausalLM.from_pretrained(checkpoint.folder))
        found[name] = Known(name, checkpoint.folder, tokens, checkpoint.weight_bytes)
    assert len({model.tokens for model in found.values()}) == len(found), "models that say the same prove nothing"
    return found


@pytest.fixture
def origin_config(known: dict[str, Known]) -> Callable[..., dict[str, Any]]:
    """Return a configuration in the origin's form, of all models or of the names given, on one device."""

    def make(*names: str, device: str = "cpu", **more: Any) -> dict[str, Any]:
        loading = {"device_map": device, "torch_dtype": "bfloat16", "disable_cpu_offload": True}
        return {name: {"path": str(known[name].folder), "loading": loading, **more} for name in names or known}

    return make
