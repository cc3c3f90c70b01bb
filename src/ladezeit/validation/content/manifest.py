"""What every tensor of a checkpoint must be once it is loaded: digest, dtype, shape and ties, by name.

A manifest is made from a reference load (see `reference`) and kept in the cache folder (see `kept`).
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ladezeit.errors import CheckpointError
from ladezeit.validation import kept


@dataclass(frozen=True)
class Entry:
    """What one name must hold; `kind` as in `inventory.Held`, `dtype` torch's name without ``torch.``."""

    digest: str
    dtype: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Manifest:
    """The tensors of a model by name, the groups of names that are one tensor, and what this rests on.

    `anchored` counts how the reference load was itself proven against the files (see `anchor`), `unanchored` names the
    parameters and persistent buffers that could not be; `origin` says what it was made from and with. Where weights are
    split over ranks, `split` has by name and way (see `ladezeit.loading.split`) the digest of each rank's part.
    """

    tensors: dict[str, Entry]
    ties: list[list[str]]
    anchored: dict[str, int]
    unanchored: list[str]
    origin: dict[str, Any] = field(default_factory=dict)
    split: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """Return plain data for `from_plain`; a tensor is a list, which keeps thousands of them cheap."""
        plain = asdict(self)
        plain["tensors"] = {name: [e.digest, e.dtype, e.shape, e.kind] for name, e in self.tensors.items()}
        return plain

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Manifest":
        """Rebuild what `to_plain` returned; raises `ValueError`, `TypeError` or `KeyError` for anything else."""
        tensors = {
            str(name): Entry(str(digest), str(dtype), tuple(map(int, shape)), str(kind))
            for name, (digest, dtype, shape, kind) in plain["tensors"].items()
        }
        return cls(**{**plain, "tensors": tensors})


def read(path: Path) -> Manifest:
    """Read a manifest file; raises `CheckpointError` where it is not there, or damaged."""
    try:
        return Manifest.from_plain(kept.read(path))
    except (ValueError, TypeError, KeyError) as cause:
        raise CheckpointError(f"{path} is no manifest: {cause!r}. Remove it, and it is made again") from cause
