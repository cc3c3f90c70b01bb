"""Verifies the reference load itself: its tensors against the bytes in the files, read without transformers.

A manifest says what transformers makes of a checkpoint. Were that wrong, every engine would be held to a wrong measure;
so each tensor that can be traced is compared with the files, by the offsets in their headers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ladezeit.checkpoint.dtypes import torch_dtype
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.errors import CheckpointError
from ladezeit.validation.digest import digest_tensor, digest_tensors
from ladezeit.validation.inventory import COMPUTED, NamedTensor, group_tied

if TYPE_CHECKING:
    from torch import Tensor

_MOST_NAMED = 10


@dataclass
class Provenance:
    """How many tensors were traced to the files, by way, and the names of those that were not.

    ``exact``: same name, same bytes. ``cast``: same name, the bytes cast to the dtype that was asked for. ``renamed``:
    other name, same bytes. ``merged``: made of several tensors of the files, each part with its bytes, in their order.
    """

    counts: dict[str, int]
    unanchored: list[str]


def trace_to_files(checkpoint: Checkpoint, held: list[NamedTensor], found: Mapping[str, str]) -> Provenance:
    """Trace the parameters and persistent buffers of a reference load to the files of `checkpoint`.

    Args:
        checkpoint: whose files are read; of pickle files nothing can be traced.
        held: the loaded model's tensors.
        found: their digests by name.

    Raises:
        CheckpointError: a tensor has the name, dtype and shape of one in the files, and other bytes.
    """
    counts = dict.fromkeys(("exact", "cast", "renamed", "merged"), 0)
    stored = file_tensors(checkpoint)
    stored_digests = digest_tensors(stored)
    names_by_digest: dict[str, list[str]] = {}
    for name, own in stored_digests.items():
        names_by_digest.setdefault(own, []).append(name)
    unanchored: list[str] = []
    differing: list[str] = []
    for group in group_tied([one for one in held if one.kind != COMPUTED]):
        ways = {_way(one, stored, stored_digests, found) for one in group}
        way: str | None = next((way for way in ("exact", "cast") if way in ways), None)
        if way is None and "differs" in ways:
            differing += [one.name for one in group]
        elif way is None and found[group[0].name] in names_by_digest:
            way = "renamed"
        elif way is None and _is_merged(group[0].tensor, names_by_digest):
            way = "merged"
        if way is None:
            unanchored += [one.name for one in group]
        else:
            counts[way] += 1
    if differing:
        raise CheckpointError(
            f"the reference load of {checkpoint.folder} does not hold what its files hold in {len(differing)} tensors "
            f"({', '.join(differing[:_MOST_NAMED])}): transformers changes them while loading, or went wrong. Their "
            f"content cannot be verified: use validation=placement, and report it to transformers"
        )
    return Provenance(counts, unanchored)


def file_tensors(checkpoint: Checkpoint) -> "dict[str, Tensor]":
    """Return the tensors of a checkpoint's safetensors files by name, mapped; none of a dtype that torch lacks."""
    import torch

    if checkpoint.file_format != "safetensors":
        return {}
    files = [np.memmap(shard, dtype=np.uint8, mode="c") for shard in checkpoint.shards]
    made = {}
    for entry in checkpoint.tensors:
        dtype = torch_dtype(entry.dtype)
        if dtype is not None:
            data = torch.from_numpy(files[entry.shard][entry.begin : entry.end])
            made[entry.name] = (
                data.view(dtype).view(entry.shape) if len(data) else torch.empty(entry.shape, dtype=dtype)
            )
    return made


def _way(
    one: NamedTensor, stored: "Mapping[str, Tensor]", stored_digests: Mapping[str, str], found: Mapping[str, str]
) -> str:
    """Return how the tensor agrees with its name's in the files: ``exact``, ``cast``, ``differs`` or ``other``."""
    own = stored.get(one.name)
    if own is None or own.shape != one.tensor.shape:
        return "other"
    if own.dtype == one.tensor.dtype:
        return "exact" if stored_digests[one.name] == found[one.name] else "differs"
    return "cast" if digest_tensor(own.to(one.tensor.dtype)) == found[one.name] else "other"


def _is_merged(tensor: "Tensor", names_by_digest: Mapping[str, list[str]]) -> bool:
    """Say whether each slice along the first dimension is one file tensor of that number, or two in a row."""
    if tensor.dim() != 3:
        return False
    for number, part in enumerate(tensor):
        if not any(
            all(_has_number(names_by_digest.get(digest_tensor(piece), []), number) for piece in pieces)
            for pieces in _splits(part)
        ):
            return False
    return True


def _splits(part: "Tensor") -> "Iterator[tuple[Any, ...]]":
    yield (part,)
    if part.shape[0] % 2 == 0:
        yield tuple(part.chunk(2))


def _has_number(names: list[str], number: int) -> bool:
    return any(f".{number}." in name for name in names)
