"""References, kept in the cache folder: one JSON file for each, whole or not at all, made again when outdated.

Of several processes that need a file one makes it and the others wait; the system lets go of the lock of one that dies.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.verify import checkpoint_identity
from ladezeit.config import RuntimeConfig
from ladezeit.errors import CheckpointError
from ladezeit.loading.quantization import Scheme
from ladezeit.system.files import hold_lock, write_atomically
from ladezeit.system.processes import run_module_json

_SCHEMA = 1
#: A reference load from a slow disk takes minutes; one that takes longer hangs.
_LIMIT_S = 1800.0
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)


def ensure_file(folder: Path, name: str, requested: dict[str, Any], build: Callable[[], dict[str, Any]]) -> Path:
    """Return the file with what `build` makes of `requested`, calling it where there is none.

    Args:
        folder: where files of this kind are kept, inside the cache folder.
        name: of the model, for people.
        requested: plain data, all that the content depends on; ``requested["place"]`` alone decides which file it is,
        so that
            what was made for other files in that place is replaced.
        build: makes the content, plain data.

    Raises:
        CheckpointError: the folder cannot be written and holds no such file. What `build` raises goes through.
    """
    path = folder / _file_name(name, requested["place"])
    if _is_there(path, requested):
        return path
    try:
        with hold_lock(path.with_name(f".{path.name}.lock")):
            if not _is_there(path, requested):
                body = json.dumps(build(), separators=(",", ":"))
                head = {"schema": _SCHEMA, "asked": requested, "sha256": hashlib.sha256(body.encode()).hexdigest()}
                write_atomically(path, json.dumps(head) + "\n" + body + "\n")
    except OSError as cause:
        raise CheckpointError(
            f"model={name}: the reference for its verification cannot be written to {folder}: {cause.strerror}. Set "
            f"LADEZEIT_CACHE to a folder that can be written, or use validation=placement, which needs none"
        ) from cause
    return path


def read_file(path: Path) -> dict[str, Any]:
    """Read what `ensure_file` wrote.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    try:
        return _parsed(path.read_bytes())[1]
    except _DAMAGED as cause:
        raise CheckpointError(f"{path} cannot be read: {cause}. Remove it, and it is made again") from cause


def _file_name(name: str, where: Any) -> str:
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
    return f"{readable[:80]}-{hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:16]}.json"


def _is_there(path: Path, requested: dict[str, Any]) -> bool:
    try:
        return bool(_parsed(path.read_bytes())[0]["asked"] == json.loads(json.dumps(requested)))
    except _DAMAGED:
        return False


def _parsed(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    first, _, rest = content.partition(b"\n")
    head, body = json.loads(first), rest.removesuffix(b"\n")
    if head["schema"] != _SCHEMA or hashlib.sha256(body).hexdigest() != head["sha256"]:
        raise ValueError("its content is not what it was written with")
    return head, dict(json.loads(body))


# What a reference is made for: a checkpoint as a point loads it.


@dataclass(frozen=True)
class ReferenceKey:
    """A checkpoint, and all of a loading method that changes what its tensors must be.

    `name` is the model's, for people. `dtype` is torch's name of the dtype that is asked for, never ``auto``; `device`
    torch's name of the run's device, `hardware` its product's name, for another product computes other last bits.
    `cache` is ladezeit's cache folder. `scheme` is what weights are quantized to, `ranks` over how many processes they
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

    def describe_place(self) -> dict[str, Any]:
        """Return what every reference depends on besides the files' content, plain data for `ensure_file`."""
        place: dict[str, Any] = {
            "folder": str(self.checkpoint.folder),
            "dtype": self.dtype,
            "torch": version("torch"),
            "transformers": version("transformers"),
        }
        if self.scheme is not None:
            library = f"{self.scheme.library} {version(self.scheme.library)}"
            quantized = {**asdict(self.scheme), "version": library, "words": self.scheme.words}
            place["quantised"] = {**quantized, "device": self.device, "hardware": self.hardware}
        return place

    def files_identity(self) -> dict[str, Any]:
        """Return what is equal as long as the checkpoint's files are what they were."""
        return checkpoint_identity(self.checkpoint)

    def make_request(self) -> dict[str, Any]:
        """Return what every reference process is told."""
        return {
            "folder": str(self.checkpoint.folder),
            "dtype": self.dtype,
            "device": self.device,
            "trust_remote_code": self.trust_remote_code,
            "scheme": None if self.scheme is None else asdict(self.scheme),
        }


def run_reference(
    module: str, subject: ReferenceKey, request: dict[str, Any], runtime: RuntimeConfig | None = None
) -> dict[str, Any]:
    """Return what the reference process `module` answers; raises as `run_module_json` does."""
    return run_module_json(
        module, request, f"model={subject.name}", "its reference load", limit_s=_LIMIT_S, runtime=runtime
    )
