"""A load that is going on, and all who wait for it."""

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ladezeit.serving.loader import Loaded
    from ladezeit.serving.resident import Resident


@dataclass
class Pending:
    """One load; its `outcome` is the same for all. `leases` are granted as it ends, before anybody could evict it."""

    outcome: "Future[tuple[Resident, Loaded]]" = field(default_factory=Future)
    leases: Counter[int] = field(default_factory=Counter)
