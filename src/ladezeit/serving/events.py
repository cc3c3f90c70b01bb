"""What a manager tells while it works: one typed event for each thing that happened, with when it did.

Times are nanoseconds since 1970 (`time.time_ns`), taken when the thing happened and not when it was told.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladezeit.config import RunConfig
from ladezeit.result import Phase
from ladezeit.serving.budget import Bytes

if TYPE_CHECKING:
    from ladezeit.validation import Proof


@dataclass(frozen=True)
class Event:
    """What all events have: the model's name and when it happened."""

    model: str
    at_ns: int


@dataclass(frozen=True)
class LoadStarted(Event):
    """A load begins; `needs` are the bytes that the checkpoint's headers promise."""

    needs: Bytes


@dataclass(frozen=True)
class PhaseFinished(Event):
    """A phase of a load that is over, from `start_ns` to `at_ns`; told once its load has ended well."""

    phase: Phase
    start_ns: int


@dataclass(frozen=True)
class Proven(Event):
    """What was looked at after a load, what that says and what it cost."""

    level: str
    passed: bool
    reason: str
    cost_s: float


@dataclass(frozen=True)
class LoadRecord:
    """What a load was asked to be and what it came to, without the model: enough for a result file."""

    config: RunConfig
    folder: Path
    weight_bytes: int
    file_bytes: int
    effective: dict[str, Any]
    proof: "Proof"


@dataclass(frozen=True)
class LoadFinished(Event):
    """A model is loaded and can be used; `start_ns` is when its load began. A loader of your own has no `record`."""

    start_ns: int
    seconds: float
    method: str
    holds: Bytes
    phases: tuple[Phase, ...]
    record: LoadRecord | None = None


@dataclass(frozen=True)
class LoadFailed(Event):
    """A load ended without a model; all who waited for it were told the same `error`."""

    start_ns: int
    seconds: float
    error: Exception


class Why(Enum):
    """Why a model was unloaded."""

    asked = "asked"
    evicted = "evicted"
    swapped = "swapped"


@dataclass(frozen=True)
class Unloaded(Event):
    """A model is gone from the manager, `start_ns` to `at_ns`.

    `freed` is what the process gave back to the machine meanwhile; `still_held`: somebody has its tensors yet.
    """

    start_ns: int
    why: Why
    held: Bytes
    freed: Bytes
    still_held: bool


Listener = Callable[[Event], None]
