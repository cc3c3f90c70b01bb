"""The engine `legacy_manager`: the origin case's manager before its cure, kept to be compared with.

It does what that manager did, in its order: read its performance settings from a JSON file, twice; pass `max_memory`
whatever the placement; accept any offload without a word; then walk every module to look for meta tensors.

That walk took the origin about 170 s. Asking each tensor where it is takes milliseconds; a walk that takes minutes has
to move weights. `walk=values` is one that does: each module copies every weight below it to the host to look for values
that are not finite, so that a weight is copied once for every module above it.
"""

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from ladezeit.config import TransformersLoading
from ladezeit.loading.base import EngineModel, EngineSpec, LoadRequest
from ladezeit.loading.engines.safetensors import MAPPED_ON_SERVERS
from ladezeit.loading.engines.transformers import from_pretrained, placement_arguments
from ladezeit.model.tensors import fault_in_pages, meta_tensors
from ladezeit.timing.clock import Clock

SETTINGS_FILE = "performance_settings.json"


class ModuleWalk(Enum):
    """What a manager does to each tensor below each module: ask where it is, or copy it to the host and look at it."""

    meta = "meta"
    values = "values"


@dataclass
class LegacyManagerLoading(TransformersLoading):
    """The origin case's manager as it was before: no rule is enforced, every module is walked after the load."""

    engine: str = "legacy_manager"
    settings_reads: int = 2
    walk: ModuleWalk = ModuleWalk.meta

    checks_placement: ClassVar[bool] = False


class LegacyManagerEngine:
    """Loads as the origin's ModelManager did, with its overhead in phases of its own."""

    def prepare(self, request: LoadRequest[LegacyManagerLoading]) -> None:
        """Write the settings file in the origin's form: settings keyed by the model's name."""
        loading = request.loading
        arguments = placement_arguments(loading, request.device)
        arguments["max_memory"] = {str(key): size for key, size in arguments.get("max_memory", {}).items()}
        settings = {"loading": arguments, "disable_cpu_offload": loading.disable_cpu_offload}
        self._settings_path(request).write_text(json.dumps({request.checkpoint.folder.name: settings}))

    def load(self, request: LoadRequest[LegacyManagerLoading], clock: Clock) -> EngineModel:
        """See `Engine.load`; nothing that was not asked for is refused here, as it was not there."""
        loading = request.loading
        settings: dict[str, Any] = {}
        for _ in range(loading.settings_reads):
            with clock.span("load/settings"):
                settings = json.loads(self._settings_path(request).read_text())[request.checkpoint.folder.name]
        arguments = settings["loading"]
        arguments["max_memory"] = {
            int(key) if key.isdigit() else key: size for key, size in arguments["max_memory"].items()
        }
        loaded = from_pretrained(request, clock, **arguments)
        with clock.span("load/module_walk"):
            if loading.walk is ModuleWalk.values:
                loaded.effective["not_finite_found"] = len(_not_finite(loaded.model))
            else:
                loaded.effective["meta_tensors_found"] = len(meta_tensors(loaded.model))
        with clock.span("load/touch"):
            loaded.effective["touched_bytes"] = fault_in_pages(loaded.model)
        return loaded

    @staticmethod
    def _settings_path(request: LoadRequest) -> Path:
        return request.scratch / SETTINGS_FILE


def _not_finite(model: Any) -> set[str]:
    """Return the names of weights that hold a value which is not finite; what has no data here is passed over."""
    found = set()
    for path, module in model.named_modules():
        for name, weight in module.named_parameters():
            if not weight.is_meta and not weight.detach().cpu().isfinite().all():
                found.add(f"{path}.{name}" if path else name)
    return found


ENGINES = (
    EngineSpec(
        name="legacy_manager",
        arguments=LegacyManagerLoading,
        make=LegacyManagerEngine,
        formats=("safetensors", "pickle"),
        servers=MAPPED_ON_SERVERS,
    ),
)
