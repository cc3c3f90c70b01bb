"""What a manager asks of whoever loads: what a model needs, before anything is read, and the model."""

from collections.abc import Sequence
from typing import Any, Protocol

from ladezeit.config import RuntimeConfig
from ladezeit.result import Phase
from ladezeit.serving.budget import Bytes
from ladezeit.serving.settings import ModelSettings


class Loaded(Protocol):
    """A loaded model, as `ladezeit.load` returns it."""

    @property
    def model(self) -> Any:
        """The `transformers` model."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer; None where it has none."""
        ...

    @property
    def phases(self) -> Sequence[Phase]:
        """Where the time went, in seconds since the load was asked for."""
        ...


class Loader(Protocol):
    """Loads one model after another in this process."""

    @property
    def runtime(self) -> RuntimeConfig:
        """The performance settings of the process that all its models share."""
        ...

    def needs(self, settings: ModelSettings) -> Bytes:
        """Return the memory that the model will take, by the headers of its checkpoint; reads no weights."""
        ...

    def load(self, settings: ModelSettings) -> Loaded:
        """Load and prove the model.

        Raises:
            LadezeitError: it could not be loaded, or is not what was asked for.
        """
        ...
