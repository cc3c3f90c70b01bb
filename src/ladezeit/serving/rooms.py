"""Which models are in memory, and how room is made for one more: the least recently used goes first, none in use.

A model that has to go while it is in use is drained: its leases run out, new ones wait. So a load that waits for room
gets it, however busy the models before it are.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ladezeit.serving.budget import NOTHING, Budget, BudgetError, Bytes, in_words
from ladezeit.serving.holding import Holding, give_back, taken_bytes
from ladezeit.serving.resident import Resident

#: How often is looked whether memory that somebody outside still holds came back: nobody tells when it does.
_POLL_S = 0.05
_RETRY_S = 0.25


class Rooms:
    """The models in memory and their account. `changed` guards everything; what takes long is done without it."""

    def __init__(self, budget: Budget, told: Callable[[Resident, Bytes, int, bool], None]) -> None:
        self.budget = budget
        self.changed = threading.Condition()
        self.residents: dict[str, Resident] = {}
        self.given_up: dict[str, Holding] = {}  # by charge: out of the manager, in somebody's hands
        self._told = told
        self._uses = 0

    def next_use(self) -> int:
        """Return a number that is larger than all before: the order in which models were used."""
        self._uses += 1
        return self._uses

    def settle(self) -> None:
        """Take off the account what was given up and is gone by now."""
        for charge, holding in list(self.given_up.items()):
            if holding.is_gone():
                del self.given_up[charge]
                self.budget.release(charge)

    def fits_beside(self, kept: Resident, need: Bytes) -> bool:
        """Say whether `need` finds room while `kept` stays, if everything else that nobody uses goes."""
        self.settle()
        others = (each for each in self.residents.values() if each is not kept and not each.leased)
        can_go = sum((each.size for each in others), NOTHING)
        lacking = self.budget.lacking(need)
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
                    self.settle()
                    lacking = self.budget.lacking(need)
                    if lacking == NOTHING:
                        self.budget.charge(charge, need)
                        return
                    victim = self._least_recently_used(lacking)
                    if victim is None:
                        self._drain(lacking)
                        self._wait(name, need, lacking, deadline)
                        continue
                    del self.residents[victim.name]
                self.evict(victim)

    def evict(self, victim: Resident) -> None:
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
                self.budget.release(victim.charge)
            else:
                self.given_up[victim.charge] = victim.holding
            self.changed.notify_all()
        if loaded is None:
            self._told(victim, before - taken_bytes(), began_ns, not gone)

    def remove(self, name: str, wait_s: float) -> tuple[Resident, Bytes, bool] | None:
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
                self.budget.release(resident.charge)
            else:
                self.given_up[resident.charge] = resident.holding
            self.changed.notify_all()
        return resident, before - taken_bytes(), gone

    def _drop(self, resident: Resident) -> bool:
        """Let go of the model, and say whether that was the last hold on its memory."""
        del resident.loaded
        gone = resident.holding.is_gone_after_collection()
        if gone:
            give_back()
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
