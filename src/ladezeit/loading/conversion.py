"""Checkpoints in an engine's own format: converted once into the cache folder, before any clock.

The caller's side (`convert_checkpoint`, `Conversion`) imports nothing heavy. ``python -m ladezeit.loading.conversion``
is the other side: a process of its own that writes the files, so that neither its libraries nor its memory stay. It
holds one tensor at a time (of a mixture of experts: one projection of one layer), never the model. How a folder is made
whole or not at all, under a lock and with the disk's free space checked first, is `checkpoint.cache`'s business.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ladezeit.checkpoint.cache import Progress, Recipe, build_entry
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.safetensors_header import TensorEntry
from ladezeit.errors import CheckpointError, LoadError
from ladezeit.loading import registry
from ladezeit.loading.base import Conversion
from ladezeit.system.processes import answer_request, report_progress, run_module_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ladezeit.loading.base import LoadRequest


_SECONDS_FILE = "conversion.json"


class Converter(Protocol):
    """Writes checkpoints in one format. Only `write` may import anything heavy."""

    @property
    def file_format(self) -> str:
        """The format's name, for people and for the folder in the cache."""
        ...

    @property
    def suffix(self) -> str:
        """What the names of its files end in, with the dot."""
        ...

    def describe_identity(self) -> dict[str, Any]:
        """Return what the files depend on besides the checkpoint: versions of the library and of this code."""
        ...

    def is_needed(self, checkpoint: Checkpoint) -> bool:
        """Say whether the engine needs this checkpoint converted, and cannot read it as it is."""
        ...

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Raise `NotRunnableError` where the format, or its reader, cannot hold the checkpoint."""
        ...

    def needed_bytes(self, checkpoint: Checkpoint) -> int:
        """Return the bytes of the files to be written, or a little more."""
        ...

    def write_files(self, checkpoint: Checkpoint, folder: Path, on_progress: Callable[[int], None]) -> None:
        """Write the files into the empty `folder`, telling how many bytes of weights are written."""
        ...


def convert_checkpoint(
    target: str, checkpoint: Checkpoint, model_name: str, cache: Path, progress: Progress
) -> Conversion:
    """Return `checkpoint` in the format of the converter `target` (``module:Class``), converted where it is not yet.

    Changed shards, another version of the format's library or of the converter make a new conversion.

    Raises:
        NotRunnableError: the format cannot hold this checkpoint.
        CheckpointError: the disk is too small, the conversion failed, or the checkpoint changed meanwhile. Nothing is
            left behind then.
        OutOfMemoryError: memory of the host ran out.
    """
    converter = converter_of(target)
    converter.check_checkpoint(checkpoint)
    recipe = _recipe(converter, checkpoint, model_name)

    def write(folder: Path) -> None:
        started = time.monotonic()
        run_module_json(
            "ladezeit.loading.conversion",
            {"converter": target, "checkpoint": checkpoint.to_json(), "folder": str(folder)},
            f"model={model_name}",
            f"the conversion of {checkpoint.folder}",
            variables={"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            on_progress=lambda done: progress(what, done, checkpoint.weight_bytes),
        )
        if _recipe(converter, checkpoint, model_name) != recipe:
            raise CheckpointError(
                f"model={model_name}: {checkpoint.folder} changed while it was converted: run it again"
            )
        seconds = {"seconds": round(time.monotonic() - started, 3)}
        (folder / _SECONDS_FILE).write_text(json.dumps(seconds) + "\n", encoding="utf-8")

    what = f"converting to the format of {converter.file_format}"
    folder = build_entry(cache / converter.file_format, recipe, write, progress)
    files = tuple(sorted(folder.glob(f"*{converter.suffix}")))
    seconds = json.loads((folder / _SECONDS_FILE).read_text(encoding="utf-8"))["seconds"]
    return Conversion(folder, files, sum(path.stat().st_size for path in files), seconds)


def conversion_for(
    engine: str, checkpoint: Checkpoint, model_name: str, cache: Path, progress: Progress
) -> Conversion | None:
    """Return what `engine` reads in place of `checkpoint`, see `convert_checkpoint`; None where it reads the checkpoint
    itself.
    """
    target = registry.make_converter(engine)
    if target is None or not converter_of(target).is_needed(checkpoint):
        return None
    return convert_checkpoint(target, checkpoint, model_name, cache, progress)


def converted_files(request: "LoadRequest") -> tuple[Path, ...]:
    """Return the converted files of `request`, checked to be there in full length.

    Raises:
        LoadError: there are none, or they are not as long as they were made: readers of some formats do not notice.
    """
    conversion = request.conversion
    if conversion is None:
        raise LoadError(
            f"loading.engine={request.loading.engine} reads a format of its own, and the request has no converted "
            f"files. Make them with ladezeit.loading.conversion.convert_checkpoint"
        )
    lengths = [path.stat().st_size if path.is_file() else 0 for path in conversion.files]
    if sum(lengths) != conversion.file_bytes:
        raise LoadError(
            f"{conversion.folder} has {sum(lengths)} bytes in its files, and had {conversion.file_bytes} when they "
            f"were made. Remove that folder: it is made again"
        )
    return conversion.files


def converter_of(target: str) -> Converter:
    """Return a new converter by its ``module:Class``."""
    module, _, name = target.partition(":")
    made: Converter = getattr(import_module(module), name)()
    return made


def read_tensor(checkpoint: Checkpoint, entry: TensorEntry) -> "NDArray[Any]":
    """Return the tensor's bytes as they are in its shard: one dimension of uint8.

    Raises:
        CheckpointError: the shard became shorter than its header said.
    """
    import numpy

    path, size = checkpoint.shards[entry.shard], entry.end - entry.begin
    found = numpy.fromfile(path, numpy.uint8, size, offset=entry.begin)
    if found.size != size:
        raise CheckpointError(f"{path} became shorter while it was converted: fetch or make the checkpoint again")
    return found


def _recipe(converter: Converter, checkpoint: Checkpoint, model_name: str) -> Recipe:
    # The fingerprint samples contents; an older copy of weights that were trained on must not be mistaken for them.
    shards = [[status.st_size, status.st_mtime_ns] for status in map(os.stat, checkpoint.shards)]
    return Recipe(
        name=model_name,
        kind=converter.file_format,
        identity={"checkpoint": checkpoint.fingerprint, "shards": shards, **converter.describe_identity()},
        needed_bytes=converter.needed_bytes(checkpoint),
    )


def make(request: dict[str, Any]) -> dict[str, Any]:
    """Write the files in this process, telling how many bytes of weights are written."""
    checkpoint = Checkpoint.from_json(request["checkpoint"])
    converter_of(request["converter"]).write_files(checkpoint, Path(request["folder"]), report_progress)
    return {}


if __name__ == "__main__":
    sys.exit(answer_request(make, sys.argv[1:]))
