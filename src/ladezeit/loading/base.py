"""The protocol between a loading method and everything around it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ladezeit.checkpoint.resolve import Checkpoint
    from ladezeit.config import LoadingConfig
    from ladezeit.measure.clock import Clock


@dataclass(frozen=True)
class LoadRequest:
    """What to load and where to.

    `device` is a torch device name (``cpu``, ``cuda:0``); `attn_implementation` None leaves the library's choice;
    `scratch` is an empty folder that outlives the load (for offloaded weights).
    """

    checkpoint: "Checkpoint"
    loading: "LoadingConfig"
    device: str
    scratch: Path
    attn_implementation: str | None = None
    trust_remote_code: bool = False


@dataclass
class LoadedModel:
    """A `transformers` model in memory and what its load was found to have done.

    `device_map` is the resolved placement (module to device) where there was one. `effective` says what really
    happened, whatever was asked for. Key lists hold parameter names of the model.
    """

    model: Any
    device_map: dict[str, str] | None = None
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[str] = field(default_factory=list)
    effective: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """Code that brings a checkpoint's tensors into memory as a `transformers` model."""

    def prepare(self, request: LoadRequest) -> None:
        """Make ready what must not be on the clock (a conversion, a settings file); called once before `load`."""
        ...

    def load(self, request: LoadRequest, clock: "Clock") -> LoadedModel:
        """Load the model inside the caller's span ``load``, opening spans ``load/<phase>`` for its own phases.

        Raises:
            LoadError: the result would not be what was asked for.
        """
        ...
