"""How a manager loads: by `ladezeit.load`'s own road, with what its settings say of each model."""

import os
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ladezeit.checkpoint.resolve import Checkpoint, prepare_checkpoint
from ladezeit.config import DType, LoadConfig, LoadingConfig, RuntimeConfig, TransformersLoading
from ladezeit.errors import ConfigError
from ladezeit.loading import device_map
from ladezeit.loading.preflight import weights_bytes
from ladezeit.serving.events import (
    Event,
    LoadFailed,
    LoadFinished,
    LoadRecord,
    LoadStarted,
    PhaseFinished,
    Telemetry,
    Verified,
    now_ns,
)
from ladezeit.serving.load import LoadedModel, StorageWatch, load_as_chosen
from ladezeit.serving.manager_config import ManagerSettings, ModelSettings
from ladezeit.serving.model_cache import NOTHING, BudgetError, ModelCache, Resident, bytes_of
from ladezeit.serving.protocols import Bytes
from ladezeit.serving.request import ChosenLoad, LoadArguments, config_of, loading_of
from ladezeit.system import torch_settings
from ladezeit.system.files import cache_folder
from ladezeit.system.fork import renew_after_fork
from ladezeit.system.gpus import ResolvedDevice, resolve_device
from ladezeit.system.processes import trim_allocators

if TYPE_CHECKING:
    from ladezeit.serving.protocols import Loaded, Loader


#: Of all managers of the process.
_TURN = threading.Lock()
renew_after_fork(_TURN)


class InProcessLoader:
    """Loads in this process; see `Loader`. Performance settings are the manager's: a load applies none again."""

    def __init__(self, settings: ManagerSettings) -> None:
        self.runtime = settings.runtime if settings.runtime is not None else _agreed(settings)

    def estimate_needs(self, settings: ModelSettings) -> Bytes:
        """See `Loader.needs`; a model that is not on this machine is made, converted or downloaded first."""
        chosen, device = self._chosen(settings)
        config = chosen.config
        return _needs(config, device, prepare_checkpoint(config.model, cache_folder()))

    def load_model(self, settings: ModelSettings) -> LoadedModel:
        """See `Loader.load`."""
        return load_as_chosen(*self._chosen(settings))

    def _chosen(self, settings: ModelSettings) -> tuple[ChosenLoad, ResolvedDevice]:
        device = resolve_device(settings.device)
        chosen = config_of(_asked(settings), device)
        attention = self.runtime.attn_implementation
        model = replace(chosen.config.model, name=settings.name)
        config = replace(chosen.config, model=model, runtime=RuntimeConfig(attn_implementation=attention))
        return replace(chosen, config=config), device


def _asked(settings: ModelSettings) -> LoadArguments:
    return LoadArguments(
        settings.source,
        loading=None if settings.profile is not None else _loading(settings),
        profile=settings.profile,
        validation=settings.validation,
        max_memory=settings.max_memory,
        allow_offload=settings.allow_offload,
    )


def _loading(settings: ModelSettings) -> LoadingConfig:
    """Return the method: an option with the dtype that was asked for, or what the arguments say."""
    if settings.method is None:
        return loading_of(settings.arguments)
    found = loading_of(settings.method)
    dtype = settings.arguments.get("dtype")
    return found if dtype is None else replace(found, dtype=DType[dtype])


def _needs(config: LoadConfig, device: ResolvedDevice, checkpoint: Checkpoint) -> Bytes:
    """Return the bytes by place; what may be offloaded counts on the GPUs as far as its budget there goes."""
    loading = config.loading
    weights = weights_bytes(loading, checkpoint.weight_bytes, checkpoint.dtype)
    if device.gpu is None:
        return Bytes(host=weights)
    if loading.disable_cpu_offload or not isinstance(loading, TransformersLoading):
        return Bytes(gpu=weights)
    budget = device_map.max_memory(loading, device.name) or {}
    on_gpus = sum(size for place, size in budget.items() if isinstance(place, int))
    gpu = min(weights, on_gpus) if on_gpus else weights
    return Bytes(gpu=gpu, host=weights - gpu)


def _agreed(settings: ManagerSettings) -> RuntimeConfig:
    """Return the performance settings that all models of a profile were measured with; a process has them once."""
    first: tuple[str, RuntimeConfig] | None = None
    for name, model in settings.models.items():
        found = config_of(_asked(model), resolve_device(model.device)).config.runtime
        if first is not None and found != first[1]:
            raise ConfigError(
                f"the profile has {name} measured with {found}, and {first[0]} with {first[1]}: a process has one set "
                f"of performance settings. Measure both with the same, or serve them from two processes"
            )
        first = first or (name, found)
    return first[1] if first is not None else RuntimeConfig()


# The process's performance settings (threads, matrix precision, …): read once, applied once, before the first load.


class Performance:
    """Settings that are the same for all models of a process; `effective` is what torch said was in effect after."""

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        self.effective: dict[str, Any] | None = None
        self.applied = 0
        self._lock = threading.Lock()
        if "torch" not in sys.modules and config != RuntimeConfig():
            os.environ.update(torch_settings.import_environment(config))  # what torch reads as it is imported

    def apply_settings(self, settings: ModelSettings) -> None:
        """Apply them where that was not done; raises `ConfigError` where one did not take effect."""
        with self._lock:
            if self.applied:
                return
            device = "cpu" if settings.device == "cpu" else _device()
            self.effective = torch_settings.apply_settings(self.config, device)
            self.applied += 1


# The one load that goes on in a process at a time: room for it, settings for it, the load, its
# verification, its events.


class LoadingTurn:
    """Loads for one manager; `failures` holds the last error of each model that is not loaded because of it."""

    def __init__(self, loader: "Loader", performance: Performance, rooms: ModelCache, telemetry: Telemetry) -> None:
        self.performance = performance
        self.failures: dict[str, str] = {}
        self.loads: Counter[str] = Counter()
        self._loader = loader
        self._rooms = rooms
        self._telemetry = telemetry

    def estimate_needs(self, settings: ModelSettings) -> Bytes:
        """Return what the model will take, by its checkpoint's headers; raises where it cannot be had or loaded so."""
        return self._loader.estimate_needs(settings)

    def load_model(self, settings: ModelSettings, wait_s: float, leases: Counter[int]) -> "tuple[Resident, Loaded]":
        """Wait for the turn, make room, load, and put the model among the residents with `leases` on it.

        Raises: as `ModelManager.get` does.
        """
        told: list[Event] = []
        try:
            with _TURN:
                found = self._there_already(settings.name, leases)
                return found or self._load(settings, wait_s, leases, told)
        finally:
            for event in told:
                self._telemetry.emit_event(event)

    def _there_already(self, name: str, leases: Counter[int]) -> "tuple[Resident, Loaded] | None":
        """Return the model where it was about to be evicted when it was asked for, and came back."""
        with self._rooms.changed:
            resident = self._rooms.residents.get(name)
            if resident is None:
                return None
            resident.leases += leases
            return resident, resident.loaded

    def _load(
        self, settings: ModelSettings, wait_s: float, leases: Counter[int], told: list[Event]
    ) -> "tuple[Resident, Loaded]":
        name, began_ns, began_s = settings.name, now_ns(), time.monotonic()
        charge = f"{name}#{self.loads[name]}"
        self.loads[name] += 1
        try:
            need = self._loader.estimate_needs(settings)
            self._rooms.make_room(name, charge, need, wait_s)
            self.performance.apply_settings(settings)
            told.append(LoadStarted(name, began_ns := now_ns(), need))
            began_s = time.monotonic()
            loaded = self._loader.load_model(settings)
            seconds = time.monotonic() - began_s
            resident = self._resident(name, charge, loaded, seconds)
        except BaseException as error:
            self._failed(name, charge, error)
            if isinstance(error, Exception):
                told.append(LoadFailed(name, now_ns(), began_ns, time.monotonic() - began_s, error))
            raise
        told += _events(resident, loaded, began_ns)
        with self._rooms.changed:
            self.failures.pop(name, None)
            resident.leases += leases
            self._rooms.residents[name] = resident
            self._rooms.changed.notify_all()
        return resident, loaded

    def _resident(self, name: str, charge: str, loaded: "Loaded", seconds: float) -> Resident:
        """Take the model's real size to account; raises `BudgetError` where that is more than there may be."""
        size = bytes_of(loaded.model)
        with self._rooms.changed:
            self._rooms.budget.charge_account(charge, size)
            over = self._rooms.budget.excess_memory()
            used_at = self._rooms.next_use()
        if over != NOTHING:
            raise BudgetError(
                f"{name} took {size}, {over} more than the budget leaves, although its checkpoint promised less: it "
                f"was unloaded. Raise the budget, or load it with a smaller dtype"
            )
        return Resident(name, charge, loaded, size, StorageWatch(loaded.model), seconds, used_at)

    def _failed(self, name: str, charge: str, error: BaseException) -> None:
        """Free what the failed load left: the frames of its traceback hold tensors as long as the error is kept."""
        traceback.clear_frames(error.__traceback__)
        with self._rooms.changed:
            self._rooms.budget.release_charge(charge)
            self.failures[name] = str(error) or type(error).__name__
            self._rooms.changed.notify_all()
        trim_allocators()


def _events(resident: Resident, loaded: "Loaded", began_ns: int) -> list[Event]:
    name, ended_ns = resident.name, now_ns()
    phases = tuple(loaded.phases)
    events: list[Event] = [
        PhaseFinished(name, began_ns + round((p.start_s + p.duration_s) * 1e9), p, began_ns + round(p.start_s * 1e9))
        for p in phases
    ]
    record = _record(loaded)
    if record is not None:
        verification = record.verification
        events.append(
            Verified(name, ended_ns, verification.level, verification.passed, verification.reason, verification.total_s)
        )
    return [
        *events,
        LoadFinished(name, ended_ns, began_ns, resident.seconds, method_of(loaded), resident.size, phases, record),
    ]


def _record(loaded: "Loaded") -> LoadRecord | None:
    if not isinstance(loaded, LoadedModel):
        return None
    files = loaded.checkpoint
    return LoadRecord(
        loaded.config, files.folder, files.weight_bytes, files.file_bytes, loaded.effective, loaded.verification
    )


def method_of(loaded: "Loaded") -> str:
    """Return the name of the method that loaded the model."""
    return loaded.config.loading.name if isinstance(loaded, LoadedModel) else "unknown"


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
