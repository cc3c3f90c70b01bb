"""The engine `transformers`: `AutoModelForCausalLM.from_pretrained`, called as its users call it."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from ladezeit.config import TransformersLoading
from ladezeit.config.device_map import device_map, may_offload_to_disk, offload_folder
from ladezeit.config.engines import ServerFlags
from ladezeit.errors import CheckpointError, LoadError, NotRunnableError
from ladezeit.loading import instrumentation
from ladezeit.loading.base import EngineModel, EngineSpec, LoadRequest
from ladezeit.loading.build_model import naming_misshapen, unexpected_weights
from ladezeit.loading.device_map import explain_map, max_memory, name_places, refuse_unknown_modules
from ladezeit.loading.engines.safetensors import MAPPED_ON_SERVERS, READ_ON_SERVERS
from ladezeit.model.classes import library_errors, model_class
from ladezeit.model.tensors import fault_in_pages
from ladezeit.system.processes import set_variables
from ladezeit.timing.clock import Clock


class TransformersEngine:
    """Loads through `from_pretrained`, moves the model afterwards where that was asked, and touches what is lazy."""

    def prepare(self, request: LoadRequest[TransformersLoading]) -> None:
        """Check that the installed transformers knows the arguments; raises `NotRunnableError` where it does not."""
        check_known(request.loading)

    def load(self, request: LoadRequest[TransformersLoading], clock: Clock) -> EngineModel:
        """See `Engine.load`."""
        loading = request.loading
        arguments = placement_arguments(loading, request.device)
        if may_offload_to_disk(loading):
            arguments["offload_folder"] = str(offload_folder(loading, request.scratch))
        try:
            loaded = from_pretrained(request, clock, **arguments)
        except CheckpointError as error:
            if isinstance(error.__cause__, ValueError):
                explain_map(loading, request, error.__cause__)
            raise
        finish_load(loaded, request, clock)
        return loaded


def finish_load(loaded: EngineModel, request: LoadRequest[TransformersLoading], clock: Clock) -> None:
    """Refuse a placement of no module and unasked offload, move the model where that was asked, and touch it."""
    loading = request.loading
    refuse_unknown_modules(loaded.model, loading)
    if loading.disable_cpu_offload:
        refuse_offload(loaded, request.device)
    if loading.move_to_device:
        with clock.span("load/move"):
            loaded.model.to(request.device)
    with clock.span("load/touch"):
        loaded.effective["touched_bytes"] = fault_in_pages(loaded.model)


def placement_arguments(loading: TransformersLoading, device: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that decide where tensors go and as what; none that was not asked."""
    arguments: dict[str, Any] = {
        "dtype": loading.dtype.value,
        "device_map": device_map(loading, device),
        "max_memory": max_memory(loading, device),
        "offload_folder": loading.offload_folder,
        "disable_mmap": loading.disable_mmap,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def from_pretrained(request: LoadRequest, clock: Clock, **arguments: Any) -> EngineModel:
    """Call `from_pretrained` on the request's checkpoint with its phases observed where the clock wants detail."""
    from transformers import AutoModelForCausalLM

    if request.attn_implementation is not None:
        arguments["attn_implementation"] = request.attn_implementation
    call = {"output_loading_info": True, "local_files_only": True, **arguments}
    call["trust_remote_code"] = request.trust_remote_code
    folder = str(request.checkpoint.folder)
    effective: dict[str, Any] = {"arguments": {key: _plain(value) for key, value in arguments.items()}}
    environment = _environment(request)
    if environment:
        effective["environment"] = environment
    with set_variables(environment), library_errors(folder), naming_misshapen(request):
        if clock.detail:
            with instrumentation.install_hooks(clock, model_class(request.checkpoint.config)) as missing:
                model, info = AutoModelForCausalLM.from_pretrained(folder, **call)
            effective["seams_missing"] = missing
        else:
            model, info = AutoModelForCausalLM.from_pretrained(folder, **call)
    return EngineModel(
        model=model,
        device_map=name_places(getattr(model, "hf_device_map", None)),
        missing_keys=sorted(info["missing_keys"]),
        unexpected_keys=unexpected_weights(info["unexpected_keys"], type(model), request),
        mismatched_keys=sorted(str(key) for key in info["mismatched_keys"]),
        effective=effective,
    )


def _environment(request: LoadRequest) -> dict[str, str]:
    """Return the variables that switch the loader's threads, which it takes in no other way; none that was not asked.

    See `convert_and_load_state_dict_in_model` in transformers' core_model_loading.py.
    """
    loading = request.loading
    asked = loading.async_load if isinstance(loading, TransformersLoading) else None
    return {} if asked is None else {"HF_DEACTIVATE_ASYNC_LOAD": str(int(not asked))}


def check_known(loading: TransformersLoading) -> None:
    """Raise `NotRunnableError` where `from_pretrained` of the installed transformers lacks an argument that is used."""
    if loading.disable_mmap is None:
        return
    from transformers import PreTrainedModel, __version__

    if "disable_mmap" not in signature(PreTrainedModel.from_pretrained).parameters:
        raise NotRunnableError(
            f"loading.disable_mmap needs a from_pretrained that takes it, and transformers {__version__} has none: "
            f"pip install -U transformers, or leave it out"
        )


def refuse_offload(loaded: EngineModel, device: str) -> None:
    """Raise `LoadError` where a module went to the disk, or to host memory although the run is on a GPU."""
    refused = {"disk"} if device == "cpu" else {"disk", "cpu"}
    offloaded = [name for name, place in (loaded.device_map or {}).items() if place in refused]
    if offloaded:
        named = ", ".join(offloaded[:10]) + (" …" if len(offloaded) > 10 else "")
        raise LoadError(
            f"{len(offloaded)} of {len(loaded.device_map or {})} modules were offloaded ({named}) although "
            f"loading.disable_cpu_offload is set: the model does not fit where it was to go. Give it more memory "
            f"(loading.max_memory, a smaller dtype), or allow it with loading.disable_cpu_offload=false"
        )


def _plain(value: Any) -> Any:
    """Return an argument as JSON can hold it (device maps and budgets may be keyed by device number)."""
    if hasattr(value, "to_diff_dict"):  # transformers' configs: what differs from their defaults
        value = {key: item for key, item in value.to_diff_dict().items() if not key.startswith("_")}
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value


def server_flags(loading: Mapping[str, Any]) -> ServerFlags:
    """Return the flags of other servers for a load through `from_pretrained` with these arguments."""
    if isinstance(loading.get("device_map"), dict):
        return ServerFlags(
            None, None, "its own placement over devices; servers split by --tensor-parallel-size instead"
        )
    return READ_ON_SERVERS if loading.get("disable_mmap") else MAPPED_ON_SERVERS


ENGINES = (
    EngineSpec(
        name="transformers",
        arguments=TransformersLoading,
        make=TransformersEngine,
        formats=("safetensors", "pickle"),
        servers=server_flags,
    ),
)
