"""What a manager asks of whoever loads: what a model needs, before anything is read, and then the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ladezeit.config import RuntimeConfig
from ladezeit.results.records import Phase
from ladezeit.serving.manager_config import ModelSettings


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


@dataclass(frozen=True)
class Bytes:
    """Memory of a model: on all GPUs together, and on the host."""

    gpu: int = 0
    host: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.gpu + other.gpu, self.host + other.host)

    def __sub__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.gpu - other.gpu, self.host - other.host)

    def __str__(self) -> str:
        parts = [
            f"{in_words(size)} of {where} memory" for where, size in (("GPU", self.gpu), ("host", self.host)) if size
        ]
        return " and ".join(parts) or "no memory"


class Loader(Protocol):
    """Loads one model after another in this process."""

    @property
    def runtime(self) -> RuntimeConfig:
        """The performance settings of the process that all its models share."""
        ...

    def estimate_needs(self, settings: ModelSettings) -> Bytes:
        """Return the memory that the model will take, by the headers of its checkpoint; reads no weights."""
        ...

    def load_model(self, settings: ModelSettings) -> Loaded:
        """Load and verify the model.

        Raises:
            LadezeitError: it could not be loaded, or is not what was asked for.
        """
        ...


def in_words(size: int) -> str:
    """Return bytes as a person reads them: ``13.8 GiB``, ``2.6 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
