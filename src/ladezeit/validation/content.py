"""The level `content`: all that `placement` looks at, and every bit of every tensor against the manifest."""

import ctypes
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ladezeit.config import ValidationConfig
from ladezeit.errors import ran_out_of_memory
from ladezeit.loading.base import EngineModel
from ladezeit.system.libc import allocate_block, free_block
from ladezeit.validation import placement
from ladezeit.validation.digest import digest_tensor, digest_tensors, summed_by
from ladezeit.validation.expected import Expected
from ladezeit.validation.faults import Fault
from ladezeit.validation.inventory import COMPUTED, QUANTIZED, NamedTensor, group_tied, list_tensors
from ladezeit.validation.manifest import Manifest
from ladezeit.validation.verification import Finding, LevelReport

#: Every one: whatever differs from the reference load in name, shape, dtype, tie, place or any bit.
CLAIMS = frozenset(Fault)

#: More than this is not overwritten, because it would cost more than the check. C libraries and torch's CPU allocator
#: unmap larger blocks when they are freed.
MOST_BYTES = 64 * 2**20
#: Blocks of one size that are asked for in host memory.
_ROUNDS = 64
_PATTERN = 0xA5


def check_content(loaded: EngineModel, expected: Expected, config: ValidationConfig) -> LevelReport:
    """Look at the placement, then read every tensor where it lies and compare its digest with the manifest's.

    The engine is closed by then. Memory of the sizes that it lent is overwritten first, so that a tensor which still
    lies in what was given back does not pass by luck.
    """
    assert expected.manifest is not None, "validation=content needs a manifest"
    placed = placement.check_placement(loaded, expected, config)
    started = time.perf_counter()
    scribbled = poison_freed_memory(loaded.lent_bytes, expected.device)
    held = list_tensors(loaded.model)
    findings, digested = compare_tensors(held, expected.manifest, placed.findings, expected)
    return LevelReport(
        summary=f"{_claim(placed.summary, digested, expected.manifest)}; {_how(held)}",
        modules_seen=placed.modules_seen,
        tensors_seen=placed.tensors_seen,
        findings=[*placed.findings, *findings],
        metrics={
            "validation/content_s": time.perf_counter() - started,
            "validation/content_bytes": float(digested),
            "validation/scribbled_bytes": float(scribbled),
        },
        guarantee=_meaning(expected.manifest, held),
    )


@dataclass(frozen=True)
class _Seen:
    """What was read of one name."""

    digest: str
    dtype: str
    shape: tuple[int, ...]


def compare_tensors(
    held: list[NamedTensor], manifest: Manifest, already: Iterable[Finding], expected: Expected
) -> tuple[list[Finding], int]:
    """Return what in `held` is not as `manifest` has it, and how many bytes were read for it.

    What is in `already` by kind and name is not said twice. Each tensor is read once, however many names it has.
    """
    said = {(finding.kind, finding.name) for finding in already}
    grouped = group_tied(held)
    seen, read_bytes = _read(grouped)
    findings = _names(held, manifest)
    for one in held:
        if one.name in seen and one.shard_spec is not None:
            findings += _part(one.name, one.shard_spec, seen[one.name], manifest, expected.rank)
        elif one.name in seen:
            findings += _contents(one.name, seen[one.name], manifest)
        else:
            findings.append(Finding("meta", one.name, _why_unread(one.tensor)))
    findings += _ties(grouped, manifest, expected)
    return [finding for finding in findings if (finding.kind, finding.name) not in said], read_bytes


def _read(grouped: list[list[NamedTensor]]) -> tuple[dict[str, _Seen], int]:
    """Read each tensor once, those that are kept elsewhere one after the other, and return what each name holds."""
    here = {group[0].name: group[0].tensor for group in grouped if _is_readable(group[0].tensor)}
    found = digest_tensors(here)
    seen: dict[str, _Seen] = {}
    read_bytes = 0
    for group in grouped:
        tensor = here.get(group[0].name)
        if tensor is None:
            tensor = _fetched(group[0])
            if tensor is None:
                continue
            found[group[0].name] = digest_tensor(tensor)
        one = _Seen(found[group[0].name], str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        seen.update(dict.fromkeys((held.name for held in group), one))
        read_bytes += tensor.numel() * tensor.element_size()
    return seen, read_bytes


def _fetched(held: NamedTensor) -> Any:
    """Return the tensor as a forward would find it, None where there is nothing to find."""
    if held.fetch is None:
        return None
    try:
        tensor = held.fetch()
    except (KeyError, OSError) as error:
        if ran_out_of_memory(error):  # which says nothing of the model
            raise
        return None
    return tensor if _is_readable(tensor) else None


def _names(held: list[NamedTensor], manifest: Manifest) -> list[Finding]:
    there = {one.name for one in held}
    return [
        *(Finding("missing", name, "is not in the model") for name in manifest.tensors if name not in there),
        *(
            Finding("unexpected", one.name, "is in the model, and not in the reference load")
            for one in held
            if one.name not in manifest.tensors
        ),
    ]


def _contents(name: str, seen: _Seen, manifest: Manifest) -> list[Finding]:
    wanted = manifest.tensors.get(name)
    if wanted is None or wanted.digest == seen.digest:
        return []
    if seen.dtype != wanted.dtype:
        return [Finding("dtype", name, f"is {seen.dtype}, the reference load has {wanted.dtype}")]
    if seen.shape != wanted.shape:
        return [Finding("shape", name, f"has the shape {seen.shape}, the reference load has {wanted.shape}")]
    what = _source(wanted.kind, manifest)
    twin = _twin(seen.digest, wanted.shape, manifest)
    return [Finding("content", name, f"is not what {what}{twin}")]


def _source(kind: str, manifest: Manifest) -> str:
    if kind == QUANTIZED:
        return f"{_quantizer(manifest)['version']} makes of what the checkpoint holds"
    return "the model's class computes" if kind == COMPUTED else "the checkpoint holds"


def _quantizer(manifest: Manifest) -> dict[str, Any]:
    found = manifest.origin.get("quantised")
    return found if isinstance(found, dict) else {}


def _part(name: str, way: str, seen: _Seen, manifest: Manifest, rank: int | None) -> list[Finding]:
    """Return what is wrong with this rank's part of a tensor that is split in the given way."""
    wanted = manifest.tensors.get(name)
    if wanted is None:
        return []
    parts = manifest.split.get(name, {}).get(way)
    if parts is None or rank is None or rank >= len(parts):
        what = f"is split over ranks in a way ({way}) that the reference has no parts for: its content is not verified"
        return [Finding("content", name, what)]
    if seen.digest == parts[rank]:
        return []
    if seen.dtype != wanted.dtype:
        return [Finding("dtype", name, f"is {seen.dtype}, the reference load has {wanted.dtype}")]
    other = f": it is that of rank {parts.index(seen.digest)}" if seen.digest in parts else ""
    return [Finding("content", name, f"is not rank {rank}'s part of what the checkpoint holds{other}")]


def _twin(digest: str, shape: tuple[int, ...], manifest: Manifest) -> str:
    """Return whose content it is instead, where it is another tensor's of the checkpoint."""
    for name, entry in manifest.tensors.items():
        if entry.digest == digest and entry.shape == shape:
            return f": it is that of {name}"
    return ""


def _ties(grouped: list[list[NamedTensor]], manifest: Manifest, expected: Expected) -> list[Finding]:
    """Return a finding for each name that should share a tensor and does not, or shares one and should not.

    Offloaded tensors are not judged: each is brought in by itself.
    """
    # A quantizer may share a code book among all weights, or not: whoever shares wrongly holds other bytes.
    grouped = [
        group
        for group in grouped
        if all((entry := manifest.tensors.get(one.name)) is None or entry.kind != QUANTIZED for one in group)
    ]
    findings = []
    number = {one.name: index for index, group in enumerate(grouped) for one in group if not one.tensor.is_meta}
    device = {one.name: str(one.tensor.device) for group in grouped for one in group}
    for tied in manifest.ties:
        there = [name for name in tied if name in number]
        for name in there[1:]:
            apart = number[name] != number[there[0]]
            if apart and (expected.single_device or device[name] == device[there[0]]):
                what = f"is a tensor of its own, and the reference load ties it to {there[0]}"
                findings.append(Finding("tie", name, what))
    together = {name: index for index, tied in enumerate(manifest.ties) for name in tied}
    for group in grouped:
        first = together.get(group[0].name)
        for one in group[1:]:
            if first is None or together.get(one.name) != first:
                findings.append(Finding("tie", one.name, f"shares the memory of {group[0].name}, and should not"))
    return findings


def _is_readable(tensor: Any) -> bool:
    return not tensor.is_meta and str(tensor.layout) == "torch.strided"


def _why_unread(tensor: Any) -> str:
    if tensor.is_meta:
        return "has no data: it is on the meta device"
    return f"has no plain bytes to read ({tensor.layout})"


def _claim(placed: str, read_bytes: int, manifest: Manifest) -> str:
    traced = sum(manifest.anchored.values())
    ways = ", ".join(f"{count} {way}" for way, count in manifest.anchored.items() if count) or "none"
    claim = (
        f"{placed.removesuffix('values were not compared')}all {read_bytes} bytes of {len(manifest.tensors)} names "
        f"bit for bit those of a reference load by transformers {manifest.origin.get('transformers')}, of which "
        f"{traced} tensors were traced to the files ({ways})"
    )
    if manifest.unanchored:
        claim += f" and {len(manifest.unanchored)} rest on the library's conversion"
    if manifest.origin.get("quantization"):
        claim += "; quantized: the same quantized weights, which says nothing about how close they are to the original"
    quantizer = _quantizer(manifest)
    if quantizer:
        parts = sum(entry.kind == QUANTIZED for entry in manifest.tensors.values())
        claim += f"; {parts} parts of quantized weights are what {quantizer['version']} makes of those on this device"
    return claim


def _how(held: list[NamedTensor]) -> str:
    """Return what read the tensors on each device, so that a slow check explains itself."""
    devices = {one.tensor.device for one in held if _is_readable(one.tensor)}
    ways = {f"{device.type} by {summed_by(device)}" for device in devices}
    return "summed on " + " and ".join(sorted(ways)) if ways else "nothing was summed"


def _meaning(manifest: Manifest, held: list[NamedTensor]) -> str | None:
    """Return in one sentence what is verified of weights that are not the checkpoint's as they are."""
    quantizer = _quantizer(manifest)
    if quantizer:
        weights = len({n.partition(":")[0] for n, entry in manifest.tensors.items() if entry.kind == QUANTIZED})
        return (
            f"the codes and scales of {weights} weights are bit for bit those that {quantizer['version']} "
            f"({quantizer['words']}) makes of the checkpoint's, all other tensors are the checkpoint's; how close the "
            f"quantized weights are to the original is not verified"
        )
    split = len(group_tied([one for one in held if one.shard_spec is not None]))
    if split:
        return (
            f"each rank's part of {split} split weights is bit for bit its slice of the checkpoint's, all ranks' parts "
            f"together are the whole, and every rank holds all other tensors"
        )
    return None


# Overwrites memory that an engine gave back, as the next user of that memory would.


def poison_freed_memory(sizes_bytes: Sequence[int], device: str, most_bytes: int = MOST_BYTES) -> int:
    """Fill new blocks of the given sizes, one of each size and then more while they last; return the bytes filled."""
    if device == "cpu":
        once = sorted(set(sizes_bytes), reverse=True)
        return _fill_on_host(_within([size for _ in range(_ROUNDS) for size in once], most_bytes))
    return _fill_on_device(_within(_each_once_then_again(sizes_bytes), most_bytes), device)


def _each_once_then_again(sizes_bytes: Sequence[int]) -> list[int]:
    counted: dict[int, int] = {}
    for size in sizes_bytes:
        counted[size] = counted.get(size, 0) + 1
    once = sorted(counted, reverse=True)
    return [*once, *(size for size in once for _ in range(counted[size] - 1))]


def _within(sizes: Sequence[int], most_bytes: int) -> Iterator[int]:
    """Yield the sizes that fit, one after the other, into `most_bytes` together."""
    filled = 0
    for size in sizes:
        if 0 < size <= most_bytes - filled:
            filled += size
            yield size


def _fill_on_host(sizes: Iterator[int]) -> int:
    filled, blocks = 0, []
    for size in sizes:
        block = allocate_block(size)
        if block is None:  # memory is full: what cannot be had cannot be reused either
            break
        ctypes.memset(block, _PATTERN, size)
        blocks.append(block)
        filled += size
    for block in blocks:
        free_block(block)
    return filled


def _fill_on_device(sizes: Iterator[int], device: str) -> int:
    import torch

    blocks = []
    for size in sizes:
        try:
            blocks.append(torch.full((size,), _PATTERN, dtype=torch.uint8, device=device))
        except RuntimeError:  # the device is full
            break
    return sum(map(len, blocks))
