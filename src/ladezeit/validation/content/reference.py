"""The reference load that a manifest is made from: transformers' own `from_pretrained`, in a process of its own.

    python -m ladezeit.validation.content.reference <request.json> <output.json>

It loads onto the CPU. Where the weights in memory would not fit there they are loaded onto the run's GPU, because a
digest is the same on both.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladezeit.checkpoint.identity import identity, verify
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.errors import CheckpointError, NotRunnableError
from ladezeit.loading.quantisation import Scheme
from ladezeit.measure.limits import available_memory_bytes
from ladezeit.validation import kept
from ladezeit.validation.apart import answer, run_apart
from ladezeit.validation.content.manifest import Entry, Manifest
from ladezeit.validation.content.sums import ARITHMETIC
from ladezeit.validation.subject import Subject

if TYPE_CHECKING:
    from ladezeit.validation.content.inventory import Held

#: In the cache folder.
FOLDER = "manifests"
#: Version of how parts of tensors are named: raise it when the same load would give other names.
_NAMES = 2
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
#: What the reference process needs besides the weights.
_PROCESS_BYTES = 1.5 * 2**30
_MOST_NAMED = 10


def manifest_file(subject: Subject, building: Callable[[], None] = lambda: None) -> Path:
    """Return the file of the manifest of `subject`, made where there is none for its checkpoint's files.

    `building` is called before a manifest is made, which takes as long as a load and two passes over the weights; for
    split weights some more passes, for quantised ones the quantiser's own time twice.

    Raises:
        CheckpointError: the files are not what the hub says, or the reference load is not the checkpoint's, or the
            quantiser does not repeat itself.
        NotRunnableError: the weights fit neither into host memory nor onto the device.
    """
    checkpoint = subject.checkpoint
    verify(checkpoint, subject.cache)
    place = {
        **subject.place(),
        "quantization": checkpoint.config.get("quantization_config"),
        "ranks": subject.ranks,
        "arithmetic": ARITHMETIC,
        "names": _NAMES,
    }
    asked = {"place": place, "files": subject.files()}

    def build() -> dict[str, Any]:
        building()
        request = {
            **subject.request(),
            "checkpoint": checkpoint.to_json(),
            "reference_device": _device(checkpoint, subject.dtype, subject.device, subject.name),
            "ranks": subject.ranks,
            "asked": asked,
        }
        return run_apart("ladezeit.validation.content.reference", request, f"model={subject.name}")

    return kept.ensure(subject.cache / FOLDER, subject.name, asked, build)


def reference_load(folder: str, dtype: str, device: str, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Return what `from_pretrained` makes of a folder on one device, and what it says about its keys.

    Raises:
        CheckpointError: it had to make up values.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # The CPU is named too: without a map bitsandbytes takes a GPU where it finds one.
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        device_map={"": device},
        output_loading_info=True,
        local_files_only=True,
        **arguments,
    )
    made_up = [*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])]
    if made_up:
        raise CheckpointError(
            f"{folder} lacks {len(made_up)} tensors of its model ({', '.join(sorted(made_up)[:_MOST_NAMED])}): "
            f"transformers makes up their values, so there is nothing to prove them by. Fetch the checkpoint again"
        )
    return model, info


def make(request: dict[str, Any]) -> dict[str, Any]:
    """Make the manifest in this process; returns plain data."""
    from ladezeit.validation.content.anchor import anchor
    from ladezeit.validation.content.digest import digests
    from ladezeit.validation.content.inventory import groups, inventory

    checkpoint = Checkpoint.from_json(request["checkpoint"])
    model, info = reference_load(
        request["folder"],
        request["dtype"],
        request["reference_device"],
        trust_remote_code=request["trust_remote_code"],
    )
    held = inventory(model)
    grouped = groups(held)
    found: dict[str, str] = {}
    by_first = digests({group[0].name: group[0].tensor for group in grouped})
    for group in grouped:
        found.update({one.name: by_first[group[0].name] for one in group})
    anchors = anchor(checkpoint, held, found)
    entries = {
        one.name: Entry(
            found[one.name], str(one.tensor.dtype).removeprefix("torch."), tuple(one.tensor.shape), one.kind
        )
        for one in held
    }
    split = _split(grouped, request["ranks"], _is_packed(model)) if request["ranks"] else {}
    if request["scheme"]:
        entries = _with_quantised(entries, model, request)
    if identity(checkpoint) != request["asked"]["files"]:
        raise CheckpointError(f"the files in {checkpoint.folder} changed while their manifest was made: try again")
    ties = [[one.name for one in group] for group in grouped if len(group) > 1]
    origin = {
        **request["asked"]["place"],
        "device": request["reference_device"],
        "dropped": sorted(info["unexpected_keys"]),
    }
    return Manifest(entries, ties, anchors.counts, anchors.unanchored, origin, split).to_plain()


def _with_quantised(entries: dict[str, Entry], model: Any, request: dict[str, Any]) -> dict[str, Entry]:
    """Return the entries of a plain load, with the parts that the quantiser makes of a weight in place of the weight.

    Raises:
        CheckpointError: the quantiser does not repeat itself.
    """
    from ladezeit.validation.content.quantiser import quantised_entries

    made = quantised_entries(model, Scheme(**request["scheme"]), request["dtype"], request["device"])
    put: dict[str, Entry] = {}
    for name, entry in entries.items():
        put.update(made.get(name, [(name, entry)]))
    return put


def _split(grouped: "Iterable[list[Held]]", ranks: int, packed: bool) -> dict[str, dict[str, list[str]]]:
    """Return the digests of all ranks' parts of each parameter, for each way in which it may be split.

    Which of them a plan uses shows only in the load; a way that is not here is a finding there. `packed`: some tensors
    hold two projections one after the other, each of which is split.
    """
    from ladezeit.loading.split import part, way
    from ladezeit.validation.content.digest import digests
    from ladezeit.validation.content.inventory import PARAMETER

    found: dict[str, dict[str, list[str]]] = {}
    for group in grouped:
        tensor = group[0].tensor
        if group[0].kind != PARAMETER:
            continue
        groups = (1, 2) if packed and tensor.dim() > 1 else (1,)
        ways = {}
        for one in (way(dimension, count) for dimension in range(tensor.dim()) for count in groups):
            parts = digests({str(rank): part(tensor, one, rank, ranks) for rank in range(ranks)})
            ways[one] = list(parts.values())
        found.update({one.name: ways for one in group})
    return found


def _is_packed(model: Any) -> bool:
    """Say whether the model's plan for tensor parallelism has weights of several projections in one."""
    plan = getattr(model, "_tp_plan", None) or {}
    return any("packed" in str(style) for style in plan.values())


def _device(checkpoint: Checkpoint, dtype: str, device: str, name: str) -> str:
    """Return where the reference is loaded: on the CPU where its weights fit, on the run's device otherwise."""
    ratio = _ITEM_BYTES.get(dtype, 2) / _ITEM_BYTES.get(checkpoint.dtype, 2)
    needed = checkpoint.weight_bytes * ratio + _PROCESS_BYTES
    available = available_memory_bytes()
    if needed <= available:
        return "cpu"
    if device != "cpu":
        return device
    raise NotRunnableError(
        f"model={name}: the reference load that its content is proven by needs {needed / 2**30:.1f} GiB of host "
        f"memory, {available / 2**30:.1f} GiB are available: use validation=placement, or loading.dtype=auto"
    )


if __name__ == "__main__":
    sys.exit(answer(make, sys.argv[1:]))
