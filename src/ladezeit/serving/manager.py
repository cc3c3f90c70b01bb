"""ModelManager: several models in one process, each loaded once, verified, and unloaded when others need its memory."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladezeit.errors import ConfigError, LadezeitError, LoadError, did_you_mean
from ladezeit.serving.events import Listener, Telemetry, Unloaded, Why, now_ns
from ladezeit.serving.in_process import InProcessLoader, LoadingTurn, Performance, method_of
from ladezeit.serving.manager_config import ManagerSettings, ModelSettings, read_settings
from ladezeit.serving.model_cache import NOTHING, Account, Budget, Machine, ModelCache, Resident
from ladezeit.serving.protocols import Bytes

if TYPE_CHECKING:
    from collections.abc import Collection

    from ladezeit.serving.protocols import Loaded, Loader


# A load that is going on, and all who wait for it.


@dataclass
class Pending:
    """One load; its `outcome` is the same for all. `leases` are granted as it ends, before anybody could evict it."""

    outcome: "Future[tuple[Resident, Loaded]]" = field(default_factory=Future)
    leases: Counter[int] = field(default_factory=Counter)


# What unloading a model gave back, measured and not assumed.


@dataclass(frozen=True)
class UnloadReport:
    """How a model went.

    `was_loaded` is False where there was nothing to unload. `held` is what its tensors took; `freed` how much less the
    process has from the machine since (resident pages; GPU memory that torch reserves), which other threads' doings
    are part of. `still_held`: somebody outside the manager holds its tensors, so that their memory is not back.
    """

    model: str
    was_loaded: bool
    held: Bytes = NOTHING
    freed: Bytes = NOTHING
    still_held: bool = False

    def __str__(self) -> str:
        if not self.was_loaded:
            return f"{self.model} was not loaded"
        if self.still_held:
            return (
                f"{self.model} is out of the manager, but something holds its tensors: {self.held} come back when the "
                f"last reference to the model or to one of its parts goes"
            )
        return f"{self.model} is unloaded: its tensors took {self.held}, the process has {self.freed} less"


# What a ``with manager.use(name)`` block is given: the model for the time of the block, and nothing after it.


class Use:
    """A model in use; every attribute raises `LadezeitError` once the use has ended."""

    def __init__(self, name: str, loaded: "Loaded") -> None:
        self.name = name
        self._loaded: Loaded | None = loaded

    @property
    def loaded(self) -> "Loaded":
        """The loaded model with the record of its load, as `ladezeit.load` returns it."""
        if self._loaded is None:
            raise LadezeitError(
                f"the use of {self.name} has ended with its block, and the model may be gone: do what needs it inside "
                f"of `with manager.use('{self.name}')`"
            )
        return self._loaded

    @property
    def model(self) -> Any:
        """The `transformers` model."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer; None where it has none."""
        return self.loaded.tokenizer

    def end(self) -> None:
        """Let go of the model."""
        self._loaded = None


class ModelManager:
    """Loads models by name, at most once each, under a budget of memory; all methods may be called from any thread.

    Args:
        config: models by name, in the case study's form, or the path of such a JSON file or of a loading profile in
            YAML. It is read here, once.
        gpu_budget: bytes (or ``20GiB``) that the weights of all models may take on all GPUs together; None leaves it
            to what is free when a model is loaded.
        host_budget: the same for the host's memory.
        wait_s: how long a load may wait for models in use to end, in seconds.
        validation: the level for models whose configuration does not set one.
        listeners: told every event (see `ladezeit.serving.events`), in the thread in which it happened; what they
            raise is logged and goes no further.
        loader: what loads; None takes `ladezeit.load`.
        machine: what is free where no budget was given; None asks the machine.

    Raises:
        ConfigError: the configuration cannot be read, or has a key or value that there is not.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | str | Path,
        *,
        gpu_budget: int | str | None = None,
        host_budget: int | str | None = None,
        wait_s: float = 60.0,
        validation: str = "placement",
        listeners: Iterable[Listener] = (),
        loader: "Loader | None" = None,
        machine: Machine | None = None,
    ) -> None:
        self.settings = read_settings(config, validation)
        self.wait_s = wait_s
        self._telemetry = Telemetry(listeners)
        self._rooms = ModelCache(Budget(gpu_budget, host_budget, machine), self._evicted)
        loads: Loader = loader or InProcessLoader(self.settings)
        self._turn = LoadingTurn(loads, Performance(loads.runtime), self._rooms, self._telemetry)
        self._pending: dict[str, Pending] = {}
        self._closed = False

    @property
    def names(self) -> list[str]:
        """The names of all models, loaded or not."""
        return list(self.settings.models)

    def get(self, name: str) -> "Loaded":
        """Return the model, loading it where it is not in memory.

        Many threads may ask at once: one loads, the others wait and get the same model, or the same error; after an
        error the next call tries again. While you hold what you got its memory cannot be given to another model: use
        `use` where the holding should end by itself.

        Raises:
            ConfigError: there is no such model.
            BudgetError: it does not fit into memory; nothing was read.
            LadezeitError: it could not be loaded, or is not what was asked for.
        """
        return self._acquire(name, leased=False)[1]

    @contextmanager
    def use(self, name: str) -> Iterator[Use]:
        """Give the model for the time of a ``with`` block, in which it is not evicted; raises as `get` does."""
        resident, loaded = self._acquire(name, leased=True)
        thread = threading.get_ident()  # the block may end in another one
        used = Use(name, loaded)
        del loaded
        try:
            yield used
        finally:
            used.end()
            self._end_lease(resident, thread)

    def preload(self, names: Iterable[str] | None = None) -> None:
        """Load the models (all where None), one after another; raises as `get` does, and where they do not all fit."""
        wanted = self.names if names is None else list(names)
        needs = sum((self._turn.estimate_needs(self._settings_of(name)) for name in wanted), NOTHING)
        self._rooms.budget.check_can_ever_fit(" and ".join(wanted), needs)
        for name in wanted:
            self._acquire(name, leased=False)

    def unload(self, name: str, *, wait_s: float | None = None) -> UnloadReport:
        """Unload the model as soon as its uses ended, and say what came back.

        Raises:
            ConfigError: there is no such model.
            BudgetError: it was in use for longer than `wait_s` (the manager's, where None), and stays.
        """
        return self._unload(name, Why.asked, wait_s)

    def swap(self, old: str, new: str) -> "Loaded":
        """Put `new` in the place of `old`: next to it if both fit, so that `old` answers until `new` is verified.

        Where they do not both fit `old` is unloaded first, once its uses ended. Where `new` cannot be loaded beside
        it, `old` stays as it is.

        Raises: as `get` and `unload` do.
        """
        self._settings_of(old)
        need = self._turn.estimate_needs(self._settings_of(new))
        with self._rooms.changed:
            resident = self._rooms.residents.get(old)
            beside = resident is not None and old != new and self._rooms.fits_beside(resident, need)
            if resident is not None and beside:
                resident.add_lease(threading.get_ident())
        if resident is None or old == new:
            return self.get(new)
        if not beside:
            self._unload(old, Why.swapped, None)
            return self.get(new)
        try:
            loaded = self.get(new)
        finally:
            self._end_lease(resident, threading.get_ident())
            del resident
        self._unload(old, Why.swapped, None)
        return loaded

    def status(self) -> "ManagerStatus":
        """Return what is loaded, in use and charged at this moment, and what each load and verification cost."""

        with self._rooms.changed:
            self._rooms.settle_account()
            return status_of(self.settings, self._rooms, set(self._pending), self._turn)

    def close(self) -> list[UnloadReport]:
        """Refuse further calls, unload every model once its uses ended, and return what came back.

        Loads that are under way end first. Listeners that have a `close` are closed.
        """
        with self._rooms.changed:
            self._closed = True
            while self._pending:
                self._rooms.changed.wait()
            names = list(self._rooms.residents)
        reports = [self._unload(name, Why.asked, None) for name in names]
        self._telemetry.close()
        return reports

    def __enter__(self) -> "ModelManager":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _acquire(self, name: str, *, leased: bool) -> "tuple[Resident, Loaded]":
        settings = self._settings_of(name)
        me = threading.get_ident()
        with self._rooms.changed:
            while True:
                if self._closed:
                    raise LadezeitError(f"{name} was asked for, and this manager is closed: make a new one")
                resident = self._rooms.residents.get(name)
                if resident is None:
                    break
                if resident.open_to_me:
                    resident.used_at = self._rooms.next_use()
                    if leased:
                        resident.add_lease(me)
                    return resident, resident.loaded
                self._rooms.changed.wait()  # until it is gone, or whoever wanted its room gave up
            pending = self._pending.get(name)
            mine = pending is None
            if pending is None:
                pending = self._pending[name] = Pending()
            if leased:
                pending.leases[me] += 1
        if mine:
            self._load(settings, pending)
        return self._outcome(pending, leased=leased)

    def _load(self, settings: ModelSettings, pending: Pending) -> None:
        """Load, and tell all who wait, whatever happens."""
        try:
            outcome = self._turn.load_model(settings, self.wait_s, pending.leases)
        except Exception as error:
            self._no_longer_pending(settings.name)
            pending.outcome.set_exception(error)
            return
        except BaseException:  # Ctrl-C is for the thread that it reached
            self._no_longer_pending(settings.name)
            pending.outcome.set_exception(LoadError(f"the load of {settings.name} was interrupted: ask again"))
            raise
        self._no_longer_pending(settings.name)
        pending.outcome.set_result(outcome)

    def _no_longer_pending(self, name: str) -> None:
        with self._rooms.changed:
            del self._pending[name]
            self._rooms.changed.notify_all()

    def _outcome(self, pending: Pending, *, leased: bool) -> "tuple[Resident, Loaded]":
        me = threading.get_ident()
        try:
            return pending.outcome.result()
        except BaseException:
            # Interrupted while waiting: the lease that the load grants is nobody's then.
            if leased and (not pending.outcome.done() or pending.outcome.exception() is None):
                pending.outcome.add_done_callback(lambda done: self._disown(done, me))
            raise

    def _disown(self, done: "Future[tuple[Resident, Loaded]]", thread: int) -> None:
        if done.exception() is None:
            self._end_lease(done.result()[0], thread)

    def _end_lease(self, resident: Resident, thread: int) -> None:
        with self._rooms.changed:
            resident.drop_lease(thread)
            self._rooms.changed.notify_all()

    def _unload(self, name: str, why: Why, wait_s: float | None) -> UnloadReport:
        self._settings_of(name)
        began_ns = now_ns()
        removed = self._rooms.remove_model(name, self.wait_s if wait_s is None else wait_s)
        if removed is None:
            return UnloadReport(name, was_loaded=False)
        resident, freed, gone = removed
        self._telemetry.emit_event(Unloaded(name, now_ns(), began_ns, why, resident.size, freed, not gone))
        return UnloadReport(name, was_loaded=True, held=resident.size, freed=freed, still_held=not gone)

    def _evicted(self, resident: Resident, freed: Bytes, began_ns: int, still_held: bool) -> None:
        self._telemetry.emit_event(
            Unloaded(resident.name, now_ns(), began_ns, Why.evicted, resident.size, freed, still_held)
        )

    def _settings_of(self, name: str) -> ModelSettings:
        settings = self.settings.models.get(name)
        if settings is None:
            raise ConfigError(
                f"there is no model '{name}' in the manager's configuration: {', '.join(self.names)}."
                + did_you_mean(name, self.names)
            )
        return settings


# What a manager holds at one moment, as data for a status page.


@dataclass(frozen=True)
class ModelStatus:
    """One model: `state` is ``loaded``, ``loading``, ``failed`` or ``not loaded``.

    `uses` counts the leases that are open, `loads` how often it was loaded so far. `load_s`, `validation_s` (what the
    verification cost, part of `load_s`), `method` and `verification` are those of the load it is in memory by.
    """

    state: str
    validation: str
    loads: int
    uses: int = 0
    size: Bytes = NOTHING
    load_s: float | None = None
    validation_s: float | None = None
    method: str | None = None
    verification: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class ManagerStatus:
    """All models by name; bytes charged and budgets (None: what is free); performance settings as torch has them.

    `still_held` names models that were unloaded and whose tensors somebody holds: they are charged until these go.
    """

    models: dict[str, ModelStatus]
    charged: Bytes
    gpu_budget: int | None
    host_budget: int | None
    still_held: list[str]
    runtime: dict[str, Any] | None
    at_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)


def status_of(
    settings: ManagerSettings, rooms: ModelCache, pending: "Collection[str]", turn: LoadingTurn
) -> ManagerStatus:
    """Return the status; the caller holds the manager's lock."""
    account: Account = rooms.budget.account
    models = {
        name: _model(each, rooms.residents.get(name), name in pending, turn) for name, each in settings.models.items()
    }
    return ManagerStatus(
        models=models,
        charged=account.used,
        gpu_budget=account.gpu_limit,
        host_budget=account.host_limit,
        still_held=[charge.rpartition("#")[0] for charge in rooms.given_up],
        runtime=turn.performance.effective,
        at_s=time.time(),
    )


def _model(settings: ModelSettings, resident: Resident | None, loading: bool, turn: LoadingTurn) -> ModelStatus:
    name = settings.name
    loads = turn.loads[name]
    if resident is None:
        error = turn.failures.get(name)
        state = "loading" if loading else "failed" if error else "not loaded"
        return ModelStatus(state, settings.validation, loads, error=error)
    verification: Any = getattr(resident.loaded, "verification", None)
    return ModelStatus(
        state="loaded",
        validation=settings.validation,
        loads=loads,
        uses=resident.leased,
        size=resident.size,
        load_s=resident.seconds,
        validation_s=verification.total_s if verification is not None else None,
        method=method_of(resident.loaded),
        verification=verification.reason if verification is not None else None,
    )
