"""What unloading a model gave back, measured and not assumed."""

from dataclasses import dataclass

from ladezeit.serving.budget import NOTHING, Bytes


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
                f"{self.model} is out of the manager, but somebody holds its tensors: {self.held} come back when the "
                f"last reference to the model or to one of its parts goes"
            )
        return f"{self.model} is unloaded: its tensors took {self.held}, the process has {self.freed} less"
