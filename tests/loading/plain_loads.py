"""What plain `from_pretrained` makes of a folder, and what one of ladezeit's engines makes of it."""

import time
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.resolve import inspect_checkpoint
from ladezeit.config.engines import arguments_class
from ladezeit.errors import NotRunnableError
from ladezeit.loading.base import EngineModel, LoadRequest
from ladezeit.loading.registry import check_engine, make_engine
from ladezeit.timing.clock import Clock

#: The engines that yield tensors and run on a CPU, the library itself, and the one that chooses.
ENGINES = ("transformers", "streamed", "auto", "safetensors_mmap", "fastsafetensors", "runai_streamer")


def installed_engines() -> list[str]:
    return [name for name in ENGINES if _runs(name)]


def _runs(name: str) -> bool:
    try:
        check_engine(name, "cpu", "safetensors")
    except NotRunnableError:
        return False
    return True


def load_plainly(folder: Path, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(  # type: ignore[no-any-return]
        folder, dtype="auto", output_loading_info=True, local_files_only=True, **arguments
    )


def load_by(engine: str, folder: Path, *, trust_remote_code: bool = False, **arguments: Any) -> EngineModel:
    clock = Clock(time.monotonic_ns())
    loading = arguments_class(engine)(name=engine, engine=engine, **arguments)
    request = LoadRequest(
        inspect_checkpoint(folder, folder.name), loading, "cpu", folder, trust_remote_code=trust_remote_code
    )
    made = make_engine(engine)
    made.prepare(request)
    with clock.span("load"):
        return made.load(request, clock)


def differences(one: Any, other: Any) -> list[str]:
    """Return what differs: class, config, and the names of tensors that are not the same bit for bit."""
    found = [] if type(one) is type(other) else [f"class {type(one).__name__} and {type(other).__name__}"]
    if one.config.to_dict() != other.config.to_dict():
        found.append("config")
    mine, theirs = _bits(one), _bits(other)
    return found + sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))


def _bits(model: Any) -> dict[str, Any]:
    import torch

    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        name: (tensor.dtype, tensor.shape, tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in named
    }
