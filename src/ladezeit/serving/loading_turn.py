"""The one load that goes on in a process at a time: room for it, settings for it, the load, its proof, its events.

Loads take turns because each is made to use the whole machine, and because the library's own functions and default
dtype are changed while one runs, for the process and not for a thread.
"""

import threading
import time
import traceback
from collections import Counter
from typing import TYPE_CHECKING

from ladezeit.serving.budget import NOTHING, BudgetError, Bytes, bytes_of
from ladezeit.serving.events import Event, LoadFailed, LoadFinished, LoadRecord, LoadStarted, PhaseFinished, Proven
from ladezeit.serving.holding import Holding, give_back
from ladezeit.serving.loaded import LoadedModel
from ladezeit.serving.performance import Performance
from ladezeit.serving.resident import Resident
from ladezeit.serving.rooms import Rooms
from ladezeit.serving.settings import ModelSettings
from ladezeit.serving.telemetry import Telemetry, now_ns

if TYPE_CHECKING:
    from ladezeit.serving.loader import Loaded, Loader

#: Of all managers of the process.
_TURN = threading.Lock()


class LoadingTurn:
    """Loads for one manager; `failures` holds the last error of each model that is not loaded because of it."""

    def __init__(self, loader: "Loader", performance: Performance, rooms: Rooms, telemetry: Telemetry) -> None:
        self.performance = performance
        self.failures: dict[str, str] = {}
        self.loads: Counter[str] = Counter()
        self._loader = loader
        self._rooms = rooms
        self._telemetry = telemetry

    def needs(self, settings: ModelSettings) -> Bytes:
        """Return what the model will take, by its checkpoint's headers; raises where it cannot be had or loaded so."""
        return self._loader.needs(settings)

    def load(self, settings: ModelSettings, wait_s: float, leases: Counter[int]) -> "tuple[Resident, Loaded]":
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
                self._telemetry.tell(event)

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
            need = self._loader.needs(settings)
            self._rooms.make_room(name, charge, need, wait_s)
            self.performance.apply(settings)
            told.append(LoadStarted(name, began_ns := now_ns(), need))
            began_s = time.monotonic()
            loaded = self._loader.load(settings)
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
            self._rooms.budget.charge(charge, size)
            over = self._rooms.budget.overdrawn()
            used_at = self._rooms.next_use()
        if over != NOTHING:
            raise BudgetError(
                f"{name} took {size}, {over} more than the budget leaves, although its checkpoint promised less: it "
                f"was unloaded. Raise the budget, or load it with a smaller dtype"
            )
        return Resident(name, charge, loaded, size, Holding(loaded.model), seconds, used_at)

    def _failed(self, name: str, charge: str, error: BaseException) -> None:
        """Free what the failed load left: the frames of its traceback hold tensors as long as the error is kept."""
        traceback.clear_frames(error.__traceback__)
        with self._rooms.changed:
            self._rooms.budget.release(charge)
            self.failures[name] = str(error) or type(error).__name__
            self._rooms.changed.notify_all()
        give_back()


def _events(resident: Resident, loaded: "Loaded", began_ns: int) -> list[Event]:
    name, ended_ns = resident.name, now_ns()
    phases = tuple(loaded.phases)
    events: list[Event] = [
        PhaseFinished(name, began_ns + round((p.start_s + p.duration_s) * 1e9), p, began_ns + round(p.start_s * 1e9))
        for p in phases
    ]
    record = _record(loaded)
    if record is not None:
        proof = record.proof
        events.append(Proven(name, ended_ns, proof.level, proof.passed, proof.reason, proof.total_s))
    return [
        *events,
        LoadFinished(name, ended_ns, began_ns, resident.seconds, method_of(loaded), resident.size, phases, record),
    ]


def _record(loaded: "Loaded") -> LoadRecord | None:
    if not isinstance(loaded, LoadedModel):
        return None
    files = loaded.checkpoint
    return LoadRecord(loaded.config, files.folder, files.weight_bytes, files.file_bytes, loaded.effective, loaded.proof)


def method_of(loaded: "Loaded") -> str:
    """Return the name of the method that loaded the model."""
    return loaded.config.loading.name if isinstance(loaded, LoadedModel) else "unknown"
