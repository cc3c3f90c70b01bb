"""What a ``with manager.use(name)`` block is given: the model for the time of the block, and nothing after it.

The variable of a ``with`` statement lives on after its block. Were it the model itself, a service would hold a model by
it that was long evicted, and its memory would not come back.
"""

from typing import TYPE_CHECKING, Any

from ladezeit.errors import LadezeitError

if TYPE_CHECKING:
    from ladezeit.serving.loader import Loaded


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
