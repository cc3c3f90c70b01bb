"""The one road from tensors to a `transformers` model, for every engine that yields tensors.

It is `from_pretrained` of the concrete class with the tensors as its state dict: renames, converters (mixtures of
experts), ties and non-persistent buffers are the library's own, and parameters that need no conversion are the tensors
themselves, not copies. What that call leaves undone is done here: generation config, the model's origin, and an error
for every missing or unexpected key. What it does too much is taken out (`ladezeit.loading.lean`), and so are threads
for tensors to which nothing is left to do.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from ladezeit.collector import collector_paused
from ladezeit.errors import LoadError
from ladezeit.loading import seams
from ladezeit.loading.arrangement import Arrangement, arrange
from ladezeit.loading.base import Awaited, EngineModel, LoadedTensors, LoadRequest, TensorEngine, WhenRead
from ladezeit.loading.lean import lean
from ladezeit.loading.merge import merge
from ladezeit.loading.model_class import model_class
from ladezeit.loading.process_environment import variables
from ladezeit.loading.shapes import naming_misshapen
from ladezeit.loading.touch import touch
from ladezeit.measure.clock import Clock

if TYPE_CHECKING:
    from torch import Tensor

#: Phases of the call that mean something else where the tensors are there already.
_PHASES = {"load/read": "load/assign"}
#: Blocks of an engine's memory that are noted; thousands would cost milliseconds of the load.
_MOST_LENT = 500


class Assembling:
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
        """
        with collector_paused():
            with lean(), clock.span("load/arrange"):
                request = replace(request, arrangement=arrange(request))
            with self._engine.open(request, clock) as loaded:
                lent_bytes = _lent_bytes(loaded)
                made = assemble(loaded, request, clock)
                made.lent_bytes = lent_bytes
        if not loaded.touched:  # looking again at millions of pages that are there takes a tenth of a second
            with clock.span("load/touch"):
                made.effective["touched_bytes"] = touch(made.model)
        return made


def assemble(loaded: LoadedTensors, request: LoadRequest, clock: Clock) -> EngineModel:
    """Make a model of all tensors of a checkpoint; call it while the engine's buffers are still there."""
    from transformers import AutoConfig

    folder = str(request.checkpoint.folder)
    with clock.span("load/config"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=request.trust_remote_code)
    arrangement = request.arrangement or Arrangement()
    made = _from_state_dict(_state_dict(loaded, arrangement, clock), config, request, clock)
    loaded.wait()
    made.effective |= {**loaded.effective, "arranged": arrangement.told()}
    refuse_incomplete(made)
    if arrangement.merged:
        # What the library would have noted while it merged: it saves the model in the checkpoint's layout by it.
        made.model._weight_conversions = list(arrangement.conversions)
    if loaded.borrowed:
        with clock.span("load/copy"):
            made.effective["copied_bytes"] = _own(made.model, loaded)
    with clock.span("load/generation_config"):
        finish(made.model, folder)
    return made


def _state_dict(loaded: LoadedTensors, arrangement: Arrangement, clock: Clock) -> "Mapping[str, Tensor | Awaited]":
    """Return the tensors as the model wants them; where nothing is left to do they may still be under way."""
    if loaded.arranged:
        return WhenRead(loaded)
    tensors = dict(loaded.tensors)
    if not loaded.borrowed:
        loaded.by_name.clear()  # so that what is merged or cast is let go at once
    if arrangement.merged:
        with clock.span("load/merge"):
            merge(tensors, arrangement)
    return tensors


def _from_state_dict(
    tensors: "Mapping[str, Tensor | Awaited]", config: Any, request: LoadRequest, clock: Clock
) -> EngineModel:
    arguments: dict[str, Any] = {"dtype": request.loading.dtype.value, "device_map": {"": request.device}}
    if request.attn_implementation is not None:
        arguments["attn_implementation"] = request.attn_implementation
    own_class: Any = model_class(request.checkpoint.config)
    call = {"config": config, "state_dict": tensors, "output_loading_info": True, **arguments}
    effective: dict[str, Any] = {"arguments": {**arguments, "device_map": {"": str(request.device)}}}
    # Tensors that are there as the model wants them are work for no thread, and waited for where that is on the clock.
    alone = variables({"HF_DEACTIVATE_ASYNC_LOAD": "1" if isinstance(tensors, WhenRead) else None})
    with lean(), naming_misshapen(request), alone:
        if clock.detail:
            with seams.observed(clock, own_class, _PHASES) as missing:
                model, info = own_class.from_pretrained(None, **call)
            effective["seams_missing"] = missing
        else:
            model, info = own_class.from_pretrained(None, **call)
    return EngineModel(
        model=model,
        missing_keys=sorted(info["missing_keys"]),
        unexpected_keys=sorted(info["unexpected_keys"]),
        mismatched_keys=sorted(str(key) for key in info["mismatched_keys"]),
        effective=effective,
    )


def refuse_incomplete(made: EngineModel) -> None:
    """Raise `LoadError` where a weight was missing, unexpected or of another shape: the library only logs it."""
    kinds = {"missing": made.missing_keys, "unexpected": made.unexpected_keys, "misshapen": made.mismatched_keys}
    found = {kind: keys for kind, keys in kinds.items() if keys}
    if found:
        named = "; ".join(f"{kind}: {', '.join(keys[:10])}" for kind, keys in found.items())
        raise LoadError(f"the checkpoint's tensors are not the model's ({named})")


def _own(model: Any, loaded: LoadedTensors) -> int:
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


def finish(model: Any, folder: str) -> None:
    """Set what `from_pretrained` of a folder would have set: the generation config and where the model is from."""
    from transformers import GenerationConfig

    model.config.name_or_path = folder
    model.name_or_path = folder
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except OSError:
            return  # the checkpoint has none: the model keeps the one made from its config
