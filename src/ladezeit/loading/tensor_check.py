"""Compares the tensors that an engine brought with the checkpoint's headers: nothing missing, nothing else.

Contents are not looked at here (see `ladezeit.validation`): names, shapes, dtypes and devices cost microseconds.
"""

from typing import TYPE_CHECKING

from ladezeit.errors import LoadError
from ladezeit.loading.base import LoadRequest
from ladezeit.loading.dtypes import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

_MOST_NAMED = 10


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
