"""Writes mixtures of experts as safetensors in the model's own layout: the experts of a layer as one tensor.

That is what ``save_pretrained(save_original_format=False)`` of `transformers` writes, and what a reader needs that puts
tensors into a model by their names alone. Every other tensor stays as it is, and so does every dtype.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.safetensors_header import TensorEntry
from ladezeit.config import TensorLoading
from ladezeit.loading.base import LoadRequest
from ladezeit.loading.conversion import read_tensor

#: Version of this code: raise it when the same checkpoint would give another file.
_CONVERTER = 1
#: Bytes of the file besides the weights: each tensor's entry in the header, and the rest of that.
_ENTRY_BYTES = 256
_HEADER_BYTES = 4096

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file, and those of the checkpoint whose bytes make it up, one after the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    entries: tuple[TensorEntry, ...]

    @property
    def size(self) -> int:
        return sum(entry.end - entry.begin for entry in self.entries)


class FusedExpertsConverter:
    """A `Converter` to one safetensors file, for checkpoints that hold their experts one by one."""

    file_format = "merged"
    suffix = ".safetensors"

    def describe_identity(self) -> dict[str, Any]:
        """See `Converter.identity`: `transformers` says what is merged."""
        return {"converter": _CONVERTER, "transformers": version("transformers")}

    def is_needed(self, checkpoint: Checkpoint) -> bool:
        """See `Converter.wanted`."""
        return any(_EXPERT.search(entry.name) for entry in checkpoint.tensors)

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """See `Converter.check`: what was safetensors can be again."""

    def needed_bytes(self, checkpoint: Checkpoint) -> int:
        """See `Converter.needed_bytes`."""
        return checkpoint.weight_bytes + _ENTRY_BYTES * len(checkpoint.tensors) + _HEADER_BYTES

    def write_files(self, checkpoint: Checkpoint, folder: Path, on_progress: Callable[[int], None]) -> None:
        """See `Converter.write`; holds one tensor of the checkpoint at a time."""
        tensors = _merged(checkpoint)
        done = 0
        with (folder / f"model{self.suffix}").open("wb") as file:
            file.write(_header(tensors))
            for tensor in tensors:
                for entry in tensor.entries:
                    file.write(read_tensor(checkpoint, entry).data)
                    on_progress(done := done + entry.end - entry.begin)


def _merged(checkpoint: Checkpoint) -> list[_Tensor]:
    """Return the tensors of the file, in the checkpoint's order."""
    from ladezeit.loading.weight_mapping import plan_weight_mapping

    loading = TensorLoading(name=FusedExpertsConverter.file_format, engine=FusedExpertsConverter.file_format)
    mapping = plan_weight_mapping(LoadRequest(checkpoint, loading, "cpu", checkpoint.folder))
    tensors = []
    inside: set[str] = set()
    for merged in mapping.fused:
        parts = sorted(merged.slices, key=lambda part: part.start)  # they follow each other without a gap
        tensors.append(_Tensor(merged.name, merged.dtype, merged.shape, tuple(part.entry for part in parts)))
        inside |= {part.entry.name for part in parts}
    tensors += [
        _Tensor(entry.name, entry.dtype, entry.shape, (entry,))
        for entry in checkpoint.tensors
        if entry.name not in inside
    ]
    return sorted(tensors, key=lambda tensor: (tensor.entries[0].shard, tensor.entries[0].begin))


def _header(tensors: list[_Tensor]) -> bytes:
    """Return the length and the header of a safetensors file that has `tensors` one after the other."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.size]
        described[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    raw = json.dumps(described, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
