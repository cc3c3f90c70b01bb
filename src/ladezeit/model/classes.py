"""The class of a checkpoint's model, and torch's dtypes by the names that safetensors headers give them.

Source of the names: https://github.com/safetensors/safetensors, bindings/python/py_src/safetensors/torch.py.
"""

from functools import cache
from typing import Any

from ladezeit.errors import CheckpointError

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

#: Several elements share a byte: in torch such a tensor has another shape than in the header.
_PACKED = {"F4": "float4_e2m1fn_x2"}


@cache
def torch_dtype(name: str, *, packed: bool = False) -> Any:
    """Return torch's dtype of safetensors' `name`, None where this torch has none.

    Dtypes that pack several elements into a byte count only where `packed` is asked for.
    """
    import torch

    known = {**_TORCH_NAMES, **_PACKED} if packed else _TORCH_NAMES
    return getattr(torch, known.get(name, ""), None)


def has_torch_name(name: str) -> bool:
    """Return whether torch has a dtype, of one element a value, for safetensors' `name`; imports nothing."""
    return name in _TORCH_NAMES


# Finds the concrete class of a checkpoint's model, whose import takes seconds and is therefore a phase of its own.


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
