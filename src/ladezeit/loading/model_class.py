"""Finds the concrete class of a checkpoint's model, whose import takes seconds and is therefore a phase of its own."""

from functools import cache
from typing import Any

from ladezeit.errors import CheckpointError


def model_class(config: dict[str, Any]) -> type:
    """Return the causal language model class that `transformers` uses for a config.json's content.

    Raises:
        CheckpointError: the installed transformers has no causal language model of that type.
    """
    return _class_of(str(config.get("model_type", "")))


@cache
def _class_of(model_type: str) -> type:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, __version__

    if model_type in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[model_type]
        if config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
            found = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
            assert isinstance(found, type)
            return found
    raise CheckpointError(
        f"the checkpoint's config.json says model_type='{model_type}', and transformers {__version__} has no causal "
        f"language model of that type. Use a transformers version that has it"
    )
