"""The one road from tensors to a `transformers` model, for every engine that yields tensors.

It is `from_pretrained` of the concrete class with the tensors as its state dict: renames, converters (mixtures of
experts), ties and non-persistent buffers are the library's own, and parameters that need no conversion are the tensors
themselves, not copies. What that call leaves undone is done here: generation config, the model's origin, and an error
for every missing or unexpected key. What it does too much is taken out (`ladezeit.loading.transformers_patches`), and
so are threads for tensors to which nothing is left to do.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from ladezeit.checkpoint.dtypes import torch_dtype
from ladezeit.checkpoint.files import ADAPTER, FETCH_AGAIN, brings_adapter
from ladezeit.config import DType
from ladezeit.errors import CombinationError, LoadError, ran_out_of_memory
from ladezeit.loading import instrumentation
from ladezeit.loading.base import (
    EngineModel,
    FusedParameter,
    LazySlice,
    LazyStateDict,
    LoadedTensors,
    LoadRequest,
    TensorEngine,
    WeightMapping,
)
from ladezeit.loading.transformers_patches import skip_redundant_init
from ladezeit.loading.weight_mapping import names_of, plan_weight_mapping
from ladezeit.model.classes import build_on_meta, build_whole_on_meta, class_and_config, library_errors
from ladezeit.model.tensors import fault_in_pages
from ladezeit.system.gc_pause import pause_gc
from ladezeit.system.limits import available_cpus
from ladezeit.system.processes import set_variables
from ladezeit.timing.clock import Clock

if TYPE_CHECKING:
    from torch import Tensor


#: Phases of the call that mean something else where the tensors are there already.
_PHASES = {"load/read": "load/assign"}
#: Blocks of an engine's memory that are noted; thousands would cost milliseconds of the load.
_MOST_LENT = 500

_MOST_NAMED = 10


class StateDictEngine:
    """Makes an engine that yields tensors one that yields a model."""

    def __init__(self, engine: TensorEngine) -> None:
        self._engine = engine

    def prepare(self, request: LoadRequest) -> None:
        """See `Engine.prepare`."""
        self._engine.prepare(request)

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        """See `Engine.load`.

        Raises:
            LoadError: a weight is missing, unexpected or of another shape.
            CombinationError: an adapter lies beside the weights.
        """
        import torch

        refuse_adapter(request)
        if torch.get_default_device().type == "meta":
            raise LoadError(
                "a load was called inside of torch.device('meta'), where nothing has values. Call it outside: a model "
                "is built on meta by itself"
            )
        # Of weights that are made here and not in threads, as the library's are, the caller's mode would stay.
        with pause_gc(), torch.inference_mode(False):
            with library_errors(request.checkpoint.folder), skip_redundant_init(), clock.span("load/arrange"):
                request = replace(request, weight_mapping=plan_weight_mapping(request))
            with self._engine.open(request, clock) as loaded:
                lent_bytes = _lent_bytes(loaded)
                made = build_model(loaded, request, clock)
                made.lent_bytes = lent_bytes
        if not loaded.touched:  # looking again at millions of pages that are there takes a tenth of a second
            with clock.span("load/touch"):
                made.effective["touched_bytes"] = fault_in_pages(made.model)
        return made


def refuse_adapter(request: LoadRequest) -> None:
    """Raise `CombinationError` where an adapter lies beside the weights, which only `from_pretrained` adds."""
    if brings_adapter(request.checkpoint.folder):
        raise CombinationError(
            f"loading.engine={request.loading.engine} would leave out the adapter in {request.checkpoint.folder} "
            f"({ADAPTER}), which transformers adds as `peft` is installed. Use loading=transformers or "
            f"loading=auto, or merge the adapter into the weights"
        )


def build_model(loaded: LoadedTensors, request: LoadRequest, clock: Clock) -> EngineModel:
    """Make a model of all tensors of a checkpoint; call it while the engine's buffers are still there."""
    with clock.span("load/config"):
        own_class, config = class_and_config(request.checkpoint.folder, request.trust_remote_code)
    mapping = request.weight_mapping or WeightMapping()
    made = _from_state_dict(_state_dict(loaded, mapping, clock), own_class, config, request, clock)
    loaded.wait()
    made.effective |= {**loaded.effective, "arranged": mapping.describe()}
    refuse_incomplete(made)
    if mapping.fused:
        # What the library would have noted while it merged: it saves the model in the checkpoint's layout by it.
        made.model._weight_conversions = list(mapping.conversions)
    if loaded.borrowed:
        with clock.span("load/copy"):
            made.effective["copied_bytes"] = _clone_borrowed_tensors(made.model, loaded)
    with clock.span("load/generation_config"):
        finalize_model(made.model, str(request.checkpoint.folder))
    return made


def _state_dict(loaded: LoadedTensors, mapping: WeightMapping, clock: Clock) -> "Mapping[str, Tensor | LazySlice]":
    """Return the tensors as the model wants them; where nothing is left to do they may still be under way."""
    if loaded.mapped:
        return LazyStateDict(loaded)
    tensors = dict(loaded.tensors)
    if not loaded.borrowed:
        loaded.by_name.clear()  # so that what is merged or cast is let go at once
    if mapping.fused:
        with clock.span("load/merge"):
            fuse_parameters(tensors, mapping)
    return tensors


def _from_state_dict(
    tensors: "Mapping[str, Tensor | LazySlice]", own_class: Any, config: Any, request: LoadRequest, clock: Clock
) -> EngineModel:
    # What the library would find in the files for `auto` it cannot find in tensors alone.
    dtype = request.checkpoint.dtype if request.loading.dtype is DType.auto else request.loading.dtype.value
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": {"": request.device}}
    if request.attn_implementation is not None:
        arguments["attn_implementation"] = request.attn_implementation
    call = {"config": config, "state_dict": tensors, "output_loading_info": True, **arguments}
    effective: dict[str, Any] = {"arguments": {**arguments, "device_map": {"": str(request.device)}}}
    # Tensors that are there as the model wants them are work for no thread, and waited for where that is on the clock.
    alone = set_variables({"HF_DEACTIVATE_ASYNC_LOAD": "1" if isinstance(tensors, LazyStateDict) else None})
    folder = request.checkpoint.folder
    with skip_redundant_init(), library_errors(folder), naming_misshapen(request), alone:
        if clock.detail:
            with instrumentation.install_hooks(clock, own_class, _PHASES) as missing:
                model, info = own_class.from_pretrained(None, **call)
            effective["seams_missing"] = missing
        else:
            model, info = own_class.from_pretrained(None, **call)
    return EngineModel(
        model=model,
        missing_keys=sorted(info["missing_keys"]),
        unexpected_keys=unexpected_weights(info["unexpected_keys"], own_class, request),
        mismatched_keys=sorted(str(key) for key in info["mismatched_keys"]),
        effective=effective,
    )


def unexpected_weights(keys: Iterable[str], own_class: Any, request: LoadRequest) -> list[str]:
    """Return those of the library's unexpected `keys` that are weights too many, sorted.

    A class that is the text part of a larger model leaves out the other parts' weights.
    """
    found = set(keys)
    if not found or request.trust_remote_code:
        return sorted(found)
    whole = build_whole_on_meta(request.checkpoint.folder, own_class)
    if whole is None:
        return sorted(found)
    names = names_of(whole)
    return sorted(key for key, (target, _) in zip(found, names.resolve_name(found), strict=True) if target not in names)


def refuse_incomplete(made: EngineModel) -> None:
    """Raise `LoadError` where a weight was missing, unexpected or of another shape: the library only logs it."""
    kinds = {"missing": made.missing_keys, "unexpected": made.unexpected_keys, "misshapen": made.mismatched_keys}
    found = {kind: keys for kind, keys in kinds.items() if keys}
    if found:
        named = "; ".join(f"{kind}: {', '.join(keys[:10])}" for kind, keys in found.items())
        raise LoadError(f"the checkpoint's tensors are not the model's ({named})")


def _clone_borrowed_tensors(model: Any, loaded: LoadedTensors) -> int:
    """Copy every parameter and buffer that still lies in the engine's memory; return the bytes that were copied."""
    lent = {tensor.untyped_storage().data_ptr() for tensor in loaded.tensors.values()}
    copied = 0
    seen: dict[int, Any] = {}  # tied weights are one tensor and stay one
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.untyped_storage().data_ptr() in lent:
            key = tensor.data_ptr()
            if key not in seen:
                seen[key] = tensor.data.clone()
                copied += tensor.numel() * tensor.element_size()
            tensor.data = seen[key].view(tensor.shape)
    return copied


def _lent_bytes(loaded: LoadedTensors) -> list[int]:
    """Return the sizes of the blocks of memory behind the engine's first tensors; what is done with them is bounded."""
    storages = [tensor.untyped_storage() for tensor in islice(loaded.by_name.values(), _MOST_LENT)]
    return list({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def finalize_model(model: Any, folder: str) -> None:
    """Set what `from_pretrained` of a folder would have set: the generation config and where the model is from."""
    from transformers import GenerationConfig

    model.config.name_or_path = folder
    model.name_or_path = folder
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except OSError:
            return  # the checkpoint has none: the model keeps the one made from its config


# Merges tensors that a model keeps as one, for engines that bring them one by one.


def fuse_parameters(tensors: "dict[str, Tensor]", mapping: WeightMapping) -> None:
    """Put each merged tensor into `tensors` in place of its parts, on their device and in their dtype.

    Parts are let go as soon as they are merged: where each has memory of its own, two copies exist of one layer alone.
    """
    on_host = all(tensor.device.type == "cpu" for tensor in tensors.values())
    # Copies of small matrices are single-threaded in torch, which lets other threads run meanwhile.
    with ThreadPoolExecutor(available_cpus() if on_host else 1, thread_name_prefix="merge") as pool:
        for merged, tensor in pool.map(lambda one: (one, _merged(one, tensors)), mapping.fused):
            tensors[merged.name] = tensor


def _merged(merged: FusedParameter, tensors: "dict[str, Tensor]") -> "Tensor":
    import torch

    first = tensors[merged.slices[0].entry.name]
    whole = torch.empty(merged.shape, dtype=first.dtype, device=first.device)
    above = 0
    for column in merged.columns:
        parts = [tensors.pop(name) for name in column]
        height = parts[0].shape[0]
        torch._foreach_copy_(whole[:, above : above + height].unbind(0), parts)
        above += height
    return whole


# Compares the tensors that an engine brought with the checkpoint's headers: nothing missing, nothing else.


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


# Names the weights whose shape is not the model's, where a library fails and only says that there are some.


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
            model = build_on_meta(*class_and_config(request.checkpoint.folder, request.trust_remote_code))
            refuse_misshapen(model, request, cause)
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
            f"and config.json do not belong together. {FETCH_AGAIN}"
        ) from cause
