"""The engine `accelerate`: an empty model filled by `load_checkpoint_and_dispatch`, as accelerate's guide has it.

accelerate knows neither the renames and conversions of `from_pretrained` nor what a missing weight means: it logs and
goes on. Keys are therefore compared before anything is read, and mixtures of experts are read from a copy in the
model's own layout (`formats.fused_experts`). See
https://huggingface.co/docs/accelerate/concept_guides/big_model_inference.
"""

from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.files import INDEX
from ladezeit.checkpoint.safetensors_header import read_header
from ladezeit.config import STRATEGIES, DType, TransformersLoading
from ladezeit.config.device_map import device_map, offload_folder
from ladezeit.errors import CombinationError, LoadError
from ladezeit.loading.base import EngineModel, EngineSpec, LoadRequest
from ladezeit.loading.build_model import refuse_adapter, refuse_misshapen
from ladezeit.loading.conversion import converted_files
from ladezeit.loading.device_map import max_memory, name_places, refuse_uncovered, refuse_unknown_modules
from ladezeit.loading.engines.transformers import finish_load, refuse_offload, server_flags
from ladezeit.model.classes import class_and_config, library_errors
from ladezeit.timing.clock import Clock

_MOST_NAMED = 10


@dataclass
class AccelerateLoading(TransformersLoading):
    """Arguments of a load through `accelerate.load_checkpoint_and_dispatch`, which needs a `device_map`."""

    engine: str = "accelerate"
    device_map: Any = "device"

    def check_arguments(self) -> None:
        """Refuse what accelerate would take without a word and without effect; raises `CombinationError`."""
        if self.device_map is None:
            raise CombinationError(
                "loading.device_map=null leaves accelerate's empty model empty. Use device, a strategy or a mapping"
            )
        given = [name for name in ("async_load", "disable_mmap") if getattr(self, name) is not None]
        if given:
            raise CombinationError(
                f"loading.{given[0]} is an argument of transformers' own loader, which loading.engine=accelerate does "
                f"not use. Leave it out, or use loading=transformers"
            )


class AccelerateEngine:
    """Builds the concrete class on `meta`, lets accelerate place and fill it, and touches what is lazy."""

    def prepare(self, request: LoadRequest) -> None:
        """Import the library: that is not loading."""
        import_module("accelerate")

    def load(self, request: LoadRequest[AccelerateLoading], clock: Clock) -> EngineModel:
        """See `Engine.load`.

        Raises:
            LoadError: the checkpoint's tensors are not the model's by name, or a module was offloaded unasked.
        """
        loading = request.loading
        if request.conversion is not None:
            request = _of_conversion(request)
        model = _skeleton(request, clock)
        _refuse_other_keys(model, request)
        refuse_misshapen(model, request)
        refuse_unknown_modules(model, loading)
        refuse_uncovered(model, loading)
        with clock.span("load/plan"):
            device_map = _device_map(model, request)
        loaded = EngineModel(
            model, name_places(device_map), effective={"engine": f"accelerate {version('accelerate')}"}
        )
        if loading.disable_cpu_offload:
            refuse_offload(loaded, request.device)  # before anything is read: offloading writes to the disk
        _refuse_unconverted(device_map, request)
        loaded.model = _fill(model, device_map, request, clock)
        finish_load(loaded, request, clock)
        return loaded


def _of_conversion(request: LoadRequest[AccelerateLoading]) -> LoadRequest[AccelerateLoading]:
    """Return the request with the converted file as the shard of its checkpoint; configs are the checkpoint's still."""
    (file,) = converted_files(request)
    merged = replace(request.checkpoint, shards=(file,), tensors=read_header(file).tensors)
    return replace(request, checkpoint=merged)


def _skeleton(request: LoadRequest, clock: Clock) -> Any:
    """Return the model with parameters on `meta`, and buffers computed: no checkpoint holds the rotary ones."""
    import torch
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    refuse_adapter(request)
    folder = str(request.checkpoint.folder)
    asked = request.loading.dtype
    dtype = getattr(torch, request.checkpoint.dtype if asked is DType.auto else asked.value)
    extra = {} if request.attn_implementation is None else {"attn_implementation": request.attn_implementation}
    with clock.span("load/config"):
        own_class, config = class_and_config(folder, request.trust_remote_code)
    with clock.span("load/skeleton"):
        with library_errors(folder), init_empty_weights(include_buffers=False):
            model = own_class._from_config(config, dtype=dtype, **extra)
        model.tie_weights()
        model.eval()
    with clock.span("load/generation_config"):
        model.name_or_path = folder
        if model.can_generate() and (request.checkpoint.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _refuse_other_keys(model: Any, request: LoadRequest) -> None:
    wanted = model.state_dict(keep_vars=True)
    there = {entry.name for entry in request.checkpoint.tensors}
    filled = {id(wanted[name]) for name in there & wanted.keys()}  # a tied weight is filled by any of its names
    kinds = {
        "missing": sorted(name for name, tensor in wanted.items() if id(tensor) not in filled),
        "unexpected": sorted(there - wanted.keys()),
    }
    found = {kind: names for kind, names in kinds.items() if names}
    if found:
        named = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:_MOST_NAMED])}{' …' if len(names) > _MOST_NAMED else ''}"
            for kind, names in found.items()
        )
        raise LoadError(
            f"loading.engine=accelerate takes tensors by their names alone, and the checkpoint's are not the model's "
            f"({named}). Use loading=transformers, which renames and converts"
        )


def _refuse_unconverted(device_map: dict[str, Any], request: LoadRequest) -> None:
    """Refuse what accelerate does without a word: it keeps weights on the disk as they are in the file."""
    asked = request.loading.dtype
    if "disk" in device_map.values() and asked.value not in ("auto", request.checkpoint.dtype):
        raise LoadError(
            f"loading.engine=accelerate leaves weights on the disk as {request.checkpoint.dtype}, and "
            f"loading.dtype={asked.value} was asked for. Use loading.dtype=auto, or "
            f"loading=offload_disk, which converts"
        )


def _device_map(model: Any, request: LoadRequest[AccelerateLoading]) -> dict[str, Any]:
    """Return the placement by module; a strategy is resolved as `load_checkpoint_and_dispatch` itself would."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    loading = request.loading
    asked = device_map(loading, request.device)
    if isinstance(asked, dict):
        return asked
    if asked not in STRATEGIES:
        return {"": asked}
    memory = max_memory(loading, request.device)
    whole = {"no_split_module_classes": sorted(model._no_split_modules or ())}
    if asked != "sequential":
        memory = get_balanced_memory(model, max_memory=memory, low_zero=asked == "balanced_low_0", **whole)
    resolved: dict[str, Any] = infer_auto_device_map(model, max_memory=memory, **whole)
    return resolved


def _fill(model: Any, device_map: dict[str, Any], request: LoadRequest[AccelerateLoading], clock: Clock) -> Any:
    from accelerate import load_checkpoint_and_dispatch

    loading = request.loading
    folder = str(offload_folder(loading, request.scratch)) if "disk" in device_map.values() else None
    with clock.span("load/read"):
        return load_checkpoint_and_dispatch(model, _weights(request), device_map=device_map, offload_folder=folder)


def _weights(request: LoadRequest) -> str:
    """Return the one file or the index: a folder may hold several of both, and accelerate would have to guess."""
    shards = request.checkpoint.shards
    if len(shards) == 1:
        return str(shards[0])
    index: Path = request.checkpoint.folder / INDEX["safetensors"]
    if not index.is_file():
        raise LoadError(f"loading.engine=accelerate needs {index} to find the shards. Use another engine")
    return str(index)


ENGINES = (
    EngineSpec(
        name="accelerate",
        arguments=AccelerateLoading,
        make=AccelerateEngine,
        converter="ladezeit.loading.formats.fused_experts:FusedExpertsConverter",
        servers=server_flags,
    ),
)
