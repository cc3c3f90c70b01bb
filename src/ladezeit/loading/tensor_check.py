"""Compares the tensors that an engine brought with the checkpoint's headers: nothing missing, nothing else.

Contents are not looked at here (see `ladezeit.validation`): names, shapes, dtypes and devices cost microseconds.
"""

from typing import TYPE_CHECKING, Any

from ladezeit.errors import LoadError
from ladezeit.loading.base import LoadRequest

if TYPE_CHECKING:
    from torch import Tensor

#: torch's names of safetensors' dtypes (https://github.com/safetensors/safetensors, bindings/python, torch.py). Those
#: that pack several elements into a byte have another shape in torch and are left to the proof of contents.
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
_MOST_NAMED = 10


def torch_dtype(name: str) -> Any:
    """Return torch's dtype of safetensors' `name`, or None where torch has none with the same shape."""
    import torch

    return getattr(torch, _TORCH_NAMES.get(name, ""), None)


def check_complete(tensors: "dict[str, Tensor]", request: LoadRequest) -> None:
    """Check that `tensors` are those of the checkpoint's headers, on the request's device.

    Raises:
        LoadError: a tensor is missing, or not in the checkpoint, or has another shape, dtype or device.
    """
    expected = {entry.name: entry for entry in request.checkpoint.tensors}
    _refuse("missing", expected.keys() - tensors.keys(), request)
    _refuse("not in the checkpoint", tensors.keys() - expected.keys(), request)
    dtypes = {dtype: torch_dtype(dtype) for dtype in {entry.dtype for entry in expected.values()}}
    device = request.device.partition(":")[0]
    changed = {
        name
        for name, tensor in tensors.items()
        if tensor.device.type != device
        or (
            dtypes[expected[name].dtype] is not None
            and (tensor.dtype != dtypes[expected[name].dtype] or tuple(tensor.shape) != expected[name].shape)
        )
    }
    _refuse(f"of another shape, dtype or device than in the files and on {request.device}", changed, request)


def _refuse(what: str, names: "set[str]", request: LoadRequest) -> None:
    if names:
        some = ", ".join(sorted(names)[:_MOST_NAMED]) + (" …" if len(names) > _MOST_NAMED else "")
        raise LoadError(
            f"loading.engine={request.loading.engine} read {len(request.checkpoint.tensors)} tensors' worth of files, "
            f"but {len(names)} tensors are {what}: {some}. Use another engine, and report it to this one's authors"
        )
