"""The dtypes of tensors in files, by the names that safetensors headers give them: their bits, and torch's names.

Source of the names: https://github.com/safetensors/safetensors, bindings/python/py_src/safetensors/torch.py.
"""

from functools import cache
from typing import Any

#: Bits of one element, and torch's name where torch has such an element.
_DTYPES: dict[str, tuple[int, str | None]] = {
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}

#: Several elements share a byte: in torch such a tensor has another shape than in the header.
_PACKED = {"F4": "float4_e2m1fn_x2"}

DTYPE_BITS = {name: bits for name, (bits, _) in _DTYPES.items()}
#: safetensors' name by torch's.
STORED_NAMES = {torch_name: name for name, (_, torch_name) in _DTYPES.items() if torch_name is not None}
#: Torch's names of the dtypes that a whole model can have, by safetensors' names.
MODEL_DTYPES = {name: str(_DTYPES[name][1]) for name in ("BF16", "F16", "F32", "F64")}


@cache
def torch_dtype(name: str, *, packed: bool = False) -> Any:
    """Return torch's dtype of safetensors' `name`, None where this torch has none.

    Dtypes that pack several elements into a byte count only where `packed` is asked for.
    """
    import torch

    found = _DTYPES.get(name, (0, None))[1] or (_PACKED.get(name) if packed else None)
    return getattr(torch, found or "", None)


def has_torch_name(name: str) -> bool:
    """Return whether torch has a dtype, of one element a value, for safetensors' `name`; imports nothing."""
    return _DTYPES.get(name, (0, None))[1] is not None


def model_item_bytes(torch_name: str) -> int:
    """Return the bytes of a weight of a dtype that a whole model can have; 2, as most have, for any other name."""
    return DTYPE_BITS[STORED_NAMES[torch_name]] // 8 if torch_name in MODEL_DTYPES.values() else 2
