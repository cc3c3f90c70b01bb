"""A model that a manager holds: who uses it now, when it was used last, what its load was like."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ladezeit.serving.budget import Bytes
from ladezeit.serving.holding import Holding

if TYPE_CHECKING:
    from ladezeit.serving.loader import Loaded


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
    holding: Holding
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

    def lease(self, thread: int) -> None:
        """Count one more use by `thread`."""
        self.leases[thread] += 1

    def release(self, thread: int) -> None:
        """Count one use by `thread` less."""
        self.leases[thread] -= 1
        if self.leases[thread] <= 0:
            del self.leases[thread]
