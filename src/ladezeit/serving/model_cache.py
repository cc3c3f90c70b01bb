"""Which models are in memory, and how room is made for one more: the least recently used goes first, none in use.

A model that has to go while it is in use is drained: its leases run out, new ones wait. So a load that waits for room
gets it, however busy the models before it are.
"""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from ladezeit.config.device_map import UNITS, parse_size
from ladezeit.errors import ConfigError, NotRunnableError
from ladezeit.serving.load import StorageWatch, taken_bytes
from ladezeit.serving.protocols import Bytes, in_words
from ladezeit.system.processes import trim_allocators

if TYPE_CHECKING:
    from ladezeit.serving.protocols import Loaded


#: How often is looked whether memory that somebody outside still holds came back: nobody tells when it does.
_POLL_S = 0.05
_RETRY_S = 0.25


#: No memory at all.
NOTHING = Bytes()


# How much memory the models of a process may take, on its GPUs together and on the host, and how much they take.


@dataclass(frozen=True)
class Account:
    """What the manager holds on one moment: charges by model, and the limits (None: what the machine has)."""

    charges: dict[str, Bytes]
    gpu_limit: int | None
    host_limit: int | None

    @property
    def used(self) -> Bytes:
        """The sum of all charges."""
        return sum(self.charges.values(), NOTHING)


class Machine(Protocol):
    """What is free right now, where no budget was given."""

    def free_memory(self) -> Bytes:
        """Return what could still be had on the GPUs that torch sees, and on the host."""
        ...


class Budget:
    """Charges against limits; not locked: the manager asks under its own lock."""

    def __init__(self, gpu: int | str | None, host: int | str | None, machine: Machine | None = None) -> None:
        self._account = Account({}, size_bytes(gpu, "gpu_budget"), size_bytes(host, "host_budget"))
        self._machine = machine or ThisMachine()

    @property
    def account(self) -> Account:
        """The account as it is; what is returned never changes."""
        return self._account

    def charge_account(self, key: str, size: Bytes) -> None:
        """Put `key` on the account with `size`, in place of what it had there."""
        self._account = replace(self._account, charges={**self._account.charges, key: size})

    def release_charge(self, key: str) -> None:
        """Take `key` off the account; nothing happens where it is not there."""
        charges = {name: size for name, size in self._account.charges.items() if name != key}
        self._account = replace(self._account, charges=charges)

    def missing_memory(self, need: Bytes) -> Bytes:
        """Return how much has to go before `need` fits, next to all that is charged; no bytes where it fits."""
        used, free = self._account.used, self._free()
        return Bytes(
            gpu=max(0, _excess(need.gpu, used.gpu, self._account.gpu_limit, free.gpu)),
            host=max(0, _excess(need.host, used.host, self._account.host_limit, free.host)),
        )

    def excess_memory(self) -> Bytes:
        """Return by how much the charges exceed the limits."""
        used = self._account.used
        gpu, host = self._account.gpu_limit, self._account.host_limit
        return Bytes(
            gpu=0 if gpu is None else max(0, used.gpu - gpu), host=0 if host is None else max(0, used.host - host)
        )

    def check_can_ever_fit(self, name: str, need: Bytes) -> None:
        """Raise `BudgetError` where `need` alone is more than a limit: unloading everything would not help."""
        limits = (("GPU", need.gpu, self._account.gpu_limit), ("host", need.host, self._account.host_limit))
        for where, size, limit in limits:
            if limit is not None and size > limit:
                raise BudgetError(
                    f"{name} needs {in_words(size)} of {where} memory, the {where.lower()}_budget is "
                    f"{in_words(limit)}: nothing was read. Raise the budget, or load it with a smaller dtype"
                )

    def _free(self) -> Bytes:
        unlimited = self._account.gpu_limit is None or self._account.host_limit is None
        return self._machine.free_memory() if unlimited else NOTHING


# A model that a manager holds: who uses it now, when it was used last, what its load was like.


@dataclass(eq=False)
class Resident:
    """One loaded model; changed under the manager's lock only.

    `charge` names it on the account, `size` is what its tensors take. `leases` counts the uses by thread. `draining`:
    it is to go as soon as its leases end, so new ones wait. `not_before_s`: somebody outside held it when it was to be
    evicted; until then (monotonic) it is not tried again.
    """

    name: str
    charge: str
    loaded: "Loaded"
    size: Bytes
    storage_watch: StorageWatch
    seconds: float
    used_at: int
    leases: Counter[int] = field(default_factory=Counter)
    draining: bool = False
    not_before_s: float = 0.0

    @property
    def leased(self) -> int:
        """How many uses are going on."""
        return self.leases.total()

    @property
    def open_to_me(self) -> bool:
        """Whether this thread may use it now: where it is to go, only a thread that is using it already."""
        return not self.draining or self.leases[threading.get_ident()] > 0

    def add_lease(self, thread: int) -> None:
        """Count one more use by `thread`."""
        self.leases[thread] += 1

    def drop_lease(self, thread: int) -> None:
        """Count one use by `thread` less."""
        self.leases[thread] -= 1
        if self.leases[thread] <= 0:
            del self.leases[thread]


class ModelCache:
    """The models in memory and their account. `changed` guards everything; what takes long is done without it."""

    def __init__(self, budget: Budget, on_progress: Callable[[Resident, Bytes, int, bool], None]) -> None:
        self.budget = budget
        self.changed = threading.Condition()
        self.residents: dict[str, Resident] = {}
        self.given_up: dict[str, StorageWatch] = {}  # by charge: out of the manager, in somebody's hands
        self._told = on_progress
        self._uses = 0

    def next_use(self) -> int:
        """Return a number that is larger than all before: the order in which models were used."""
        self._uses += 1
        return self._uses

    def settle_account(self) -> None:
        """Take off the account what was given up and is gone by now."""
        for charge, holding in list(self.given_up.items()):
            if holding.is_gone():
                del self.given_up[charge]
                self.budget.release_charge(charge)

    def fits_beside(self, kept: Resident, need: Bytes) -> bool:
        """Say whether `need` finds room while `kept` stays, if everything else that nobody uses goes."""
        self.settle_account()
        others = (each for each in self.residents.values() if each is not kept and not each.leased)
        can_go = sum((each.size for each in others), NOTHING)
        lacking = self.budget.missing_memory(need)
        return lacking.gpu <= can_go.gpu and lacking.host <= can_go.host

    def make_room(self, name: str, charge: str, need: Bytes, wait_s: float) -> None:
        """Charge `need`, after unloading what has to go for it; waits up to `wait_s` for models that are in use.

        Raises:
            BudgetError: it cannot fit, or what is in its way did not go in time.
        """
        self.budget.check_can_ever_fit(name, need)
        deadline = time.monotonic() + wait_s
        with self._undrained_at_the_end():
            while True:
                with self.changed:
                    self.settle_account()
                    lacking = self.budget.missing_memory(need)
                    if lacking == NOTHING:
                        self.budget.charge_account(charge, need)
                        return
                    victim = self._least_recently_used(lacking)
                    if victim is None:
                        self._drain(lacking)
                        self._wait(name, need, lacking, deadline)
                        continue
                    del self.residents[victim.name]
                self.evict_model(victim)

    def evict_model(self, victim: Resident) -> None:
        """Give up a model that was taken out of `residents`; where somebody outside holds it, it is put back."""
        before, began_ns = taken_bytes(), time.time_ns()
        watched = weakref.ref(victim.loaded)
        gone = self._drop(victim)
        loaded = None if gone else watched()
        with self.changed:
            if loaded is not None:
                victim.loaded = loaded
                victim.not_before_s = time.monotonic() + _RETRY_S
                self.residents[victim.name] = victim
            elif gone:
                self.budget.release_charge(victim.charge)
            else:
                self.given_up[victim.charge] = victim.storage_watch
            self.changed.notify_all()
        if loaded is None:
            self._told(victim, before - taken_bytes(), began_ns, not gone)

    def remove_model(self, name: str, wait_s: float) -> tuple[Resident, Bytes, bool] | None:
        """Take a model out, whoever outside holds it, once its leases have ended; None where it is not in memory.

        Returns what was measured to come back, and whether its memory is gone.

        Raises:
            BudgetError: it was in use for longer than `wait_s`.
        """
        deadline = time.monotonic() + wait_s
        with self._undrained_at_the_end(), self.changed:
            while (resident := self.residents.get(name)) is not None and resident.leased:
                resident.draining = True
                if not self.changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise BudgetError(
                        f"{name} was to be unloaded and is in use {resident.leased} times, for more than {wait_s:g} s: "
                        f"end these uses, or give it longer (wait_s)"
                    )
            if resident is None:
                return None
            del self.residents[name]
        before = taken_bytes()
        gone = self._drop(resident)
        with self.changed:
            if gone:
                self.budget.release_charge(resident.charge)
            else:
                self.given_up[resident.charge] = resident.storage_watch
            self.changed.notify_all()
        return resident, before - taken_bytes(), gone

    def _drop(self, resident: Resident) -> bool:
        """Let go of the model, and say whether that was the last hold on its memory."""
        del resident.loaded
        gone = resident.storage_watch.is_gone_after_collection()
        if gone:
            trim_allocators()
        return gone

    def _least_recently_used(self, lacking: Bytes) -> Resident | None:
        now = time.monotonic()
        can_go = [each for each in self._helping(lacking) if not each.leased and each.not_before_s <= now]
        return min(can_go, key=lambda each: each.used_at, default=None)

    def _helping(self, lacking: Bytes) -> list[Resident]:
        """Return the models whose end would free memory where it is lacking."""
        every = self.residents.values()
        return [each for each in every if (lacking.gpu and each.size.gpu) or (lacking.host and each.size.host)]

    def _drain(self, lacking: Bytes) -> None:
        """Have models that are in use run out, the least recently used first, until enough will come back."""
        gpu, host = lacking.gpu, lacking.host
        for each in sorted(self._helping(lacking), key=lambda each: each.used_at):
            if gpu <= 0 and host <= 0:
                return
            each.draining = True
            gpu, host = gpu - each.size.gpu, host - each.size.host

    def _wait(self, name: str, need: Bytes, lacking: Bytes, deadline: float) -> None:
        """Wait until something changes that may help; raises `BudgetError` where nothing will, or not in time."""
        left = deadline - time.monotonic()
        in_the_way = self._in_the_way(lacking)
        if in_the_way and left > 0:
            self.changed.wait(min(left, _POLL_S) if self._unannounced(lacking) else left)
            return
        account = self.budget.account
        limits = ", ".join(
            f"{where} budget {in_words(limit)}"
            for where, limit in (("GPU", account.gpu_limit), ("host", account.host_limit))
            if limit is not None
        )
        raise BudgetError(
            f"{name} needs {need}, and {lacking} of that are missing ({limits or 'free memory of this machine'}; "
            f"{account.used} in use by loaded models): nothing was read. "
            + (f"In the way: {'; '.join(in_the_way)}" if in_the_way else "Give it more memory or a smaller dtype")
        )

    def _unannounced(self, lacking: Bytes) -> bool:
        return bool(self.given_up) or any(not each.leased for each in self._helping(lacking))

    def _in_the_way(self, lacking: Bytes) -> list[str]:
        lines = [
            f"{each.name} is in use {each.leased} times" if each.leased else f"{each.name} is held by who got it"
            for each in self._helping(lacking)
        ]
        return lines + [f"{charge.rpartition('#')[0]} was unloaded and is still held" for charge in self.given_up]

    @contextmanager
    def _undrained_at_the_end(self) -> Iterator[None]:
        """Whatever was drained for this and is still there may be used again."""
        try:
            yield
        finally:
            with self.changed:
                for each in self.residents.values():
                    each.draining = False
                self.changed.notify_all()


class BudgetError(NotRunnableError):
    """A model does not fit into the memory that the manager may use."""


class ThisMachine:
    """The machine that this process runs on."""

    def free_memory(self) -> Bytes:
        """See `Machine.free`; a process that has no CUDA yet is not made to open one."""
        from ladezeit.system.limits import available_memory_bytes

        return Bytes(gpu=_free_gpu_bytes(), host=available_memory_bytes())


def _excess(need: int, used: int, limit: int | None, free: int) -> int:
    if need == 0:
        return 0
    return need - free if limit is None else used + need - limit


def size_bytes(size: int | str | None, what: str) -> int | None:
    """Return a budget in bytes from a number or a text such as ``20GiB``; None stays None.

    Raises:
        ConfigError: `what` is not a size.
    """
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and size >= 0):
        return size
    number, unit = parse_size(str(size)) or (0, "")
    if unit not in UNITS:
        raise ConfigError(f"{what}={size!r} is no size: give bytes, or a text such as '20GiB'")
    return int(number * UNITS[unit])


def bytes_of(model: Any) -> Bytes:
    """Return the memory that the parameters and buffers of a model take, each byte once; not what is on meta."""
    from ladezeit.model.tensors import weights_bytes_by_device

    sizes = weights_bytes_by_device(model)
    gpu = sum(size for device, size in sizes.items() if device.startswith("cuda"))
    return Bytes(gpu=gpu, host=sum(sizes.values()) - gpu)


def _free_gpu_bytes() -> int:
    import torch

    from ladezeit.system.gpus import cuda_devices, gpu_memory_free_bytes, torch_has_cuda

    # The driver's management library is asked, not CUDA, which would open a context on every GPU to answer.
    free = sum(map(gpu_memory_free_bytes, cuda_devices())) if torch_has_cuda() else 0
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        every = range(torch.cuda.device_count())
        free += sum(torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index) for index in every)
    return free
