"""Whether a mapping from module to device names modules that there are, and leaves none out.

Libraries warn of a name that they do not know and go on. The names are known only when the model is, so this is looked
at after the load, or after the library gave up: nothing is built for it on the clock.
"""

from typing import Any

from ladezeit.config import TransformersLoading
from ladezeit.errors import ConfigError, did_you_mean
from ladezeit.loading.base import LoadRequest
from ladezeit.loading.model_class import model_class

_MOST_NAMED = 5


def refuse_unknown_modules(model: Any, loading: TransformersLoading) -> None:
    """Raise `ConfigError` where the mapping names what is neither a module nor a parameter of `model`."""
    if not isinstance(loading.device_map, dict):
        return
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for name in loading.device_map:
        if name not in known:
            near = sorted((other for other in known if other.count(".") <= name.count(".")), key=len)
            raise ConfigError(
                f"loading.device_map names '{name}', and {type(model).__name__} has no such module."
                + (did_you_mean(name, near) or f" There are {', '.join(filter(None, near[:_MOST_NAMED]))} and others")
            )


def refuse_uncovered(model: Any, loading: TransformersLoading) -> None:
    """Raise `ConfigError` where the mapping gives some parameter no place."""
    if not isinstance(loading.device_map, dict):
        return
    left_out = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not any(key in ("", name) or name.startswith(f"{key}.") for key in loading.device_map)
    ]
    if left_out:
        named = ", ".join(left_out[:_MOST_NAMED]) + (" …" if len(left_out) > _MOST_NAMED else "")
        raise ConfigError(
            f"loading.device_map gives no place to {len(left_out)} parameters ({named}): name the modules they are "
            f"in, or use a strategy such as loading.device_map=auto"
        )


def explain_map(loading: TransformersLoading, request: LoadRequest, cause: Exception) -> None:
    """Raise `ConfigError` from `cause` where the mapping is what a library refused; it is held against a meta model."""
    if not isinstance(loading.device_map, dict):
        return
    import torch
    from transformers import AutoConfig

    own_class: Any = model_class(request.checkpoint.config)
    folder = str(request.checkpoint.folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=request.trust_remote_code)
    with torch.device("meta"):
        model = own_class._from_config(config)
    try:
        refuse_unknown_modules(model, loading)
        refuse_uncovered(model, loading)
    except ConfigError as refusal:
        raise refusal from cause
