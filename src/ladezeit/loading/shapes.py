"""Names the weights whose shape is not the model's, where a library fails and only says that there are some."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ladezeit.errors import LoadError, ran_out_of_memory
from ladezeit.loading.base import LoadRequest
from ladezeit.loading.model_class import model_class

_MOST_NAMED = 10


@contextmanager
def naming_misshapen(request: LoadRequest) -> Iterator[None]:
    """Make an error of the block a `LoadError` with names where weights of the request have another shape.

    Weights are compared by the names that they have in the files; what a library renames is not seen. Costs nothing
    where nothing fails.
    """
    try:
        yield
    except (RuntimeError, ValueError) as cause:
        if not ran_out_of_memory(cause):
            refuse_misshapen(_skeleton(request), request, cause)
        raise


def refuse_misshapen(model: Any, request: LoadRequest, cause: Exception | None = None) -> None:
    """Raise `LoadError` where a tensor of the files has another shape than its namesake in `model`."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    found = [
        f"{entry.name}: {list(entry.shape)} instead of {list(wanted[entry.name])}"
        for entry in request.checkpoint.tensors
        if entry.name in wanted and wanted[entry.name] != tuple(entry.shape)
    ]
    if found:
        named = "; ".join(found[:_MOST_NAMED]) + (" …" if len(found) > _MOST_NAMED else "")
        raise LoadError(
            f"{len(found)} tensors of {request.checkpoint.folder} have another shape than the model's ({named}): files "
            f"and config.json do not belong together. Fetch the checkpoint again"
        ) from cause


def _skeleton(request: LoadRequest) -> Any:
    import torch
    from transformers import AutoConfig

    folder = str(request.checkpoint.folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=request.trust_remote_code)
    own_class: Any = model_class(request.checkpoint.config)
    with torch.device("meta"):
        return own_class._from_config(config)
