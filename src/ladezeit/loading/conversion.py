"""Checkpoints in an engine's own format: converted once into the cache folder, before any clock.

The caller's side (`convert_checkpoint`, `Conversion`) imports nothing heavy. ``python -m ladezeit.loading.conversion``
is the other side: a process of its own that writes the files, so that neither its libraries nor its memory stay. It
holds one tensor at a time (of a mixture of experts: one projection of one layer), never the model. How a folder is made
whole or not at all, under a lock and with the disk's free space checked first, is `checkpoint.cache`'s business.
"""

import contextlib
import errno
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ladezeit.checkpoint.cache import Progress, Recipe, build_entry
from ladezeit.checkpoint.files import shorten_value
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.safetensors_header import TensorEntry
from ladezeit.errors import CheckpointError, LoadError, OutOfMemoryError, exit_where_memory_ends
from ladezeit.loading import registry
from ladezeit.loading.base import Conversion
from ladezeit.system.limits import ended_for_memory, kernel_kills

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ladezeit.loading.base import LoadRequest


_SECONDS_FILE = "conversion.json"
_DISK_FULL = errno.ENOSPC  # the other side's exit code for it


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
        _write_apart(target, checkpoint, folder, lambda done: progress(what, done, checkpoint.weight_bytes))
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


def _write_apart(target: str, checkpoint: Checkpoint, folder: Path, on_progress: Callable[[int], None]) -> None:
    request = json.dumps({"converter": target, "checkpoint": checkpoint.to_json(), "folder": str(folder)})
    command = [sys.executable, "-P", "-m", "ladezeit.loading.conversion"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    kills_before = kernel_kills()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, env=environment, stderr=errors, **pipes) as child,
    ):
        assert child.stdin is not None and child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
                pipe.write(request)
            for line in child.stdout:
                on_progress(int(line))
        except BaseException:
            child.kill()
            raise
        code = child.wait()
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    if code == _DISK_FULL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    if code != 0:
        reason = shorten_value((lines or [f"exit code {code}"])[-1], 400)
        if ended_for_memory(code, kills_before):
            raise OutOfMemoryError(f"memory ran out while {checkpoint.folder} was converted: {reason}")
        raise CheckpointError(f"{checkpoint.folder} could not be converted: {reason}")


def _main() -> int:
    """Write what the document on standard input asks for; every line of output is the bytes of weights written."""
    # Libraries may print; the lines are ours alone. Without a reader the next one ends this process.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = json.loads(sys.stdin.read())
    checkpoint = Checkpoint.from_json(asked["checkpoint"])
    try:
        with exit_where_memory_ends():
            converter_of(asked["converter"]).write_files(
                checkpoint, Path(asked["folder"]), lambda done: print(done, file=lines, flush=True)
            )
    except OSError as cause:
        if cause.errno == errno.ENOSPC:
            return _DISK_FULL
        raise
    return 0


if __name__ == "__main__":
    sys.exit(_main())
