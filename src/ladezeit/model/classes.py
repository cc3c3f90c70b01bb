"""The class of a checkpoint's model and the config that it takes, as `AutoModelForCausalLM` finds them.

The library offers them only by making the model; here they are found without, so that weights can be planned before
they are read. Its errors become a `LadezeitError` here and wherever else it is called: `library_errors`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ladezeit.errors import CheckpointError, LadezeitError, NotRunnableError, ran_out_of_memory

_AUTO = "AutoModelForCausalLM"
#: Libraries end their reports with advice that is not about this load; what they say first is.
_MOST_SAID = 400


def model_class(config: dict[str, Any]) -> type:
    """Return the causal language model class that `transformers` uses for a config.json's content; its import takes
    seconds. Of a type that is the checkpoint's own code this is the base of all classes: no code of it is run here.

    Raises:
        CheckpointError: the installed transformers has no causal language model of that type.
    """
    try:
        return _class_of(str(config.get("model_type", "")))
    except CheckpointError:
        if not has_own_code(config):
            raise
        from transformers import PreTrainedModel

        assert isinstance(PreTrainedModel, type)
        return PreTrainedModel


def has_own_code(config: dict[str, Any]) -> bool:
    """Return whether a config.json's content names code of the checkpoint for its model or its config."""
    names = config.get("auto_map")
    return isinstance(names, dict) and bool({_AUTO, "AutoConfig"} & names.keys())


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
        f"language model of that type. {_advice(model_type, CONFIG_MAPPING)}"
    )


def _advice(model_type: str, known: Any) -> str:
    if model_type in known:
        return "It is another kind of model (an encoder, or an encoder with a decoder): use a causal language model"
    return "Use a transformers version that has it, or model.trust_remote_code=true where it brings code that you trust"


def class_and_config(folder: str | Path, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return what `AutoModelForCausalLM.from_pretrained` makes of `folder`: the model's class, and the config it takes.

    The class is the checkpoint's own code where that is trusted. Some classes are the text part of a larger model: they
    take its text config.

    Raises:
        CheckpointError: the library has no such class, or refuses the config.
        NotRunnableError: the checkpoint's code needs a package that is not installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import _get_model_class, add_generation_mixin_to_remote_model

    with library_errors(folder):
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
        known = AutoModelForCausalLM._model_mapping
        found: Any = _get_model_class(config, known) if type(config) in known else None
        own_code = (getattr(config, "auto_map", None) or {}).get(_AUTO) if trust_remote_code else None
        if own_code and (found is None or found.__module__.startswith("transformers.")):
            own = get_class_from_dynamic_module(own_code, str(folder), local_files_only=True)
            return add_generation_mixin_to_remote_model(own), config
        found = found or _class_of(str(config.model_type))
        return found, _taken_by(found, config)


def _taken_by(own_class: Any, config: Any) -> Any:
    text_class = config.sub_configs.get("text_config")
    if text_class is None or getattr(own_class, "config_class", None) is not text_class:
        return config
    text = config.get_text_config()
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        text.quantization_config = quantized
    return text


def build_on_meta(own_class: Any, config: Any, dtype: Any = None) -> Any:
    """Return the model without memory or values, as `from_pretrained` makes it before it reads anything."""
    import torch
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        return own_class._from_config(config, dtype=dtype)


def build_whole_on_meta(folder: str | Path, own_class: Any) -> Any:
    """Return the model whose text part `own_class` is, as `build_on_meta` does; None where it is no part of another.

    Raises:
        CheckpointError, NotRunnableError: see `class_and_config`.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM

    with library_errors(folder):
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        if _taken_by(own_class, config) is config:
            return None
        for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            if type(config) in auto._model_mapping:
                return build_on_meta(auto._model_mapping[type(config)], config)
    return None


@contextmanager
def library_errors(folder: str | Path) -> Iterator[None]:
    """Make what a library raises in the block, about the checkpoint in `folder`, one line that says what to do.

    Memory that ran out, and what a device reports, are no matter of the checkpoint: they pass as they are.

    Raises:
        NotRunnableError: a package is missing.
        CheckpointError: anything else.
    """
    try:
        yield
    except LadezeitError:
        raise
    except ImportError as cause:
        raise NotRunnableError(
            f"{folder} needs a package that is missing, or has another version, here: {_said(cause)}. Install it, or "
            f"use a checkpoint that needs none"
        ) from cause
    except Exception as cause:
        if ran_out_of_memory(cause) or type(cause).__name__ == "AcceleratorError":
            raise
        from transformers import __version__

        if "trust_remote_code" in str(cause):
            raise CheckpointError(
                f"{folder} brings code of its own, which makes its model. Read it and set model.trust_remote_code=true "
                f"where you trust it"
            ) from cause
        raise CheckpointError(
            f"transformers {__version__} cannot load {folder}: {type(cause).__name__}: {_said(cause)}. Use the version "
            f"that its config.json names, or correct what it says"
        ) from cause


def _said(cause: BaseException) -> str:
    text = " ".join(str(cause).split()).rstrip(".")
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]}…"
