"""Writes checkpoints in tensorizer's format: headers with hashes, then bytes, tensor after tensor.

The format keeps 256 KiB for its table of tensors, so that a checkpoint of many tensors becomes several files.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.dtypes import has_torch_name, torch_dtype
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.safetensors_header import TensorEntry
from ladezeit.errors import NotRunnableError
from ladezeit.loading.conversion import read_tensor

#: Version of this code: raise it when the same checkpoint would give other files.
_CONVERTER = 1
#: What `TensorSerializer` reserves for the table, in bytes, and the most that a tensor takes of it besides its name
#: and shape: lengths, three offsets, the dtype's name, a version.
_TABLE_BYTES = 256 * 1024
_ENTRY_BYTES = 72
#: In front of each tensor: its entry again with the hashes, at most.
_HEADER_BYTES = 256


class TensorizerConverter:
    """A `Converter` to the format of ``TensorSerializer``."""

    file_format = "tensorizer"
    suffix = ".tensors"

    def describe_identity(self) -> dict[str, Any]:
        """See `Converter.identity`."""
        return {"converter": _CONVERTER, "tensorizer": version("tensorizer")}

    def is_needed(self, checkpoint: Checkpoint) -> bool:
        """See `Converter.wanted`: the engine reads nothing else."""
        return True

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """See `Converter.check`: every dtype that torch has is kept exactly; tensors without elements are not."""
        unknown = sorted({entry.dtype for entry in checkpoint.tensors if not has_torch_name(entry.dtype)})
        if unknown:
            raise NotRunnableError(f"loading.engine=tensorizer cannot hold tensors of {', '.join(unknown)}")
        empty = next((entry.name for entry in checkpoint.tensors if entry.begin == entry.end), None)
        if empty is not None:
            raise NotRunnableError(f"loading.engine=tensorizer cannot read tensors without elements, such as {empty}")

    def needed_bytes(self, checkpoint: Checkpoint) -> int:
        """See `Converter.needed_bytes`."""
        own = sum(_HEADER_BYTES + _entry_bytes(entry) for entry in checkpoint.tensors)
        return checkpoint.weight_bytes + own + (_TABLE_BYTES + 4096) * len(in_files(checkpoint.tensors))

    def write_files(self, checkpoint: Checkpoint, folder: Path, on_progress: Callable[[int], None]) -> None:
        """See `Converter.write`; holds one tensor at a time."""
        import torch
        from tensorizer import TensorSerializer
        from tensorizer.serialization import TensorType

        done, files = 0, in_files(checkpoint.tensors)
        for number, entries in enumerate(files, 1):
            serializer = TensorSerializer(str(folder / f"model-{number:05d}-of-{len(files):05d}{self.suffix}"))
            try:
                for entry in entries:
                    raw = torch.from_numpy(read_tensor(checkpoint, entry))
                    tensor = raw.view(torch_dtype(entry.dtype)).reshape(entry.shape)
                    serializer.write_tensor(0, entry.name, TensorType.STATE_DICT, tensor)
                    on_progress(done := done + raw.numel())
            finally:
                serializer.close()


def in_files(entries: Sequence[TensorEntry]) -> list[list[TensorEntry]]:
    """Divide the tensors, in their order, into as few files as their tables allow."""
    files: list[list[TensorEntry]] = [[]]
    used = 0
    for entry in entries:
        used += _entry_bytes(entry)
        if used > _TABLE_BYTES:
            files.append([])
            used = _entry_bytes(entry)
        files[-1].append(entry)
    return files


def _entry_bytes(entry: TensorEntry) -> int:
    return _ENTRY_BYTES + len(entry.name.encode()) + 8 * len(entry.shape)
