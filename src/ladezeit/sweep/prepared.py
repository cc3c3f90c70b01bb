"""A configuration that was checked against this machine, with everything that was found for it meanwhile."""

from dataclasses import dataclass

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import RunConfig
from ladezeit.loading.base import Conversion
from ladezeit.system.gpus import ResolvedDevice


@dataclass(frozen=True)
class PreparedConfiguration:
    """What can be measured here: whoever holds one has nothing left to check. `Session.prepare` makes it.

    Attributes:
        config: as it was composed.
        device: the run's own.
        devices: all that a sample may be on, the run's own first.
        checkpoint: the model's, there and whole.
        conversion: the checkpoint as the engine reads it; None where it reads it as it is.
    """

    config: RunConfig
    device: ResolvedDevice
    devices: tuple[ResolvedDevice, ...]
    checkpoint: Checkpoint
    conversion: Conversion | None
