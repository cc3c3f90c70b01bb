"""What a reference is made for: a checkpoint as a point loads it."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.identity import identity
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.loading.quantisation import Scheme


@dataclass(frozen=True)
class Subject:
    """A checkpoint, and all of a loading method that changes what its tensors must be.

    `name` is the model's, for people. `dtype` is torch's name of the dtype that is asked for, never ``auto``; `device`
    torch's name of the run's device, `hardware` its product's name, for another product computes other last bits.
    `cache` is ladezeit's cache folder. `scheme` is what weights are quantised to, `ranks` over how many processes they
    are split.
    """

    checkpoint: Checkpoint
    name: str
    dtype: str
    device: str
    cache: Path
    hardware: str = ""
    trust_remote_code: bool = False
    scheme: Scheme | None = None
    ranks: int | None = None

    def place(self) -> dict[str, Any]:
        """Return what every reference depends on besides the files' content, plain data for `kept.ensure`."""
        place: dict[str, Any] = {
            "folder": str(self.checkpoint.folder),
            "dtype": self.dtype,
            "torch": version("torch"),
            "transformers": version("transformers"),
        }
        if self.scheme is not None:
            library = f"{self.scheme.library} {version(self.scheme.library)}"
            quantised = {**asdict(self.scheme), "version": library, "words": self.scheme.words}
            place["quantised"] = {**quantised, "device": self.device, "hardware": self.hardware}
        return place

    def files(self) -> dict[str, Any]:
        """Return what is equal as long as the checkpoint's files are what they were."""
        return identity(self.checkpoint)

    def request(self) -> dict[str, Any]:
        """Return what every reference process is told."""
        return {
            "folder": str(self.checkpoint.folder),
            "dtype": self.dtype,
            "device": self.device,
            "trust_remote_code": self.trust_remote_code,
            "scheme": None if self.scheme is None else asdict(self.scheme),
        }
