"""What `ladezeit.load` returns: a proven model, and the record of how it came to be."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ladezeit.config import RunConfig
from ladezeit.measure.clock import LOAD
from ladezeit.result import Phase

if TYPE_CHECKING:
    from ladezeit.checkpoint.resolve import Checkpoint
    from ladezeit.validation import Proof


@dataclass(eq=False)
class LoadedModel:
    """A model in this process, as it was asked for.

    `model` is the `transformers` model, in eval mode. `phases` are seconds since the call of `load`; what none of them
    explains is `total_s` less the sum of the outermost. `proof` says what was looked at and what that proves.
    `effective` says what really happened (engine, threads, bytes read, attention, dtype, device), as a result file has
    it; `device_map` is module to device where the placement was over several. `config` holds the method, and
    `chosen_by` who chose it: ``loading``, ``profile`` or ``auto``.
    """

    model: Any
    checkpoint: "Checkpoint"
    config: RunConfig
    chosen_by: str
    phases: list[Phase]
    proof: "Proof"
    effective: dict[str, Any]
    device_map: dict[str, str] | None
    total_s: float

    @property
    def load_s(self) -> float:
        """Seconds of the load alone, without imports, preparation and proof: ``load/total_s`` of a result file."""
        return sum(phase.duration_s for phase in self.phases if phase.path == LOAD)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, read at the first use; None where it has none.

        Raises:
            CheckpointError: it cannot be read.
        """
        from ladezeit.sample.inference import read_tokenizer

        return read_tokenizer(self.checkpoint.folder)

    def __repr__(self) -> str:
        return (
            f"<LoadedModel {self.config.model.name} by {self.config.loading.name} on {self.effective['device']} in "
            f"{self.load_s:.3f} s ({self.total_s:.3f} s in all); validation={self.proof.level}>"
        )
