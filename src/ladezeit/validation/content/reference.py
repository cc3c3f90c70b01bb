"""The reference load that a manifest is made from: transformers' own `from_pretrained`, in a process of its own.

    python -m ladezeit.validation.content.reference <request.json> <output.json>

It loads onto the CPU. Where the weights in memory would not fit there they are loaded onto the run's GPU, because a
digest is the same on both.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.identity import identity, verify
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.errors import CheckpointError, NotRunnableError
from ladezeit.measure.limits import available_memory_bytes
from ladezeit.validation import kept
from ladezeit.validation.apart import answer, run_apart
from ladezeit.validation.content.manifest import Entry, Manifest
from ladezeit.validation.content.sums import ARITHMETIC

#: In the cache folder.
FOLDER = "manifests"
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
#: What the reference process needs besides the weights.
_PROCESS_BYTES = 1.5 * 2**30
_MOST_NAMED = 10


def manifest_file(
    checkpoint: Checkpoint,
    *,
    name: str,
    dtype: str,
    device: str,
    cache: Path,
    trust_remote_code: bool = False,
    building: Callable[[], None] = lambda: None,
) -> Path:
    """Return the file of the manifest of `checkpoint` loaded as `dtype`, made where there is none for these files.

    Args:
        checkpoint: what is loaded.
        name: of the model, for people.
        dtype: torch's name of the dtype that is asked for, never ``auto``.
        device: torch's name of the run's device, for a model that does not fit into host memory.
        cache: ladezeit's cache folder.
        trust_remote_code: as in the model's config.
        building: called before a manifest is made, which takes as long as a load and two passes over the weights.

    Raises:
        CheckpointError: the files are not what the hub says, or the reference load is not the checkpoint's.
        NotRunnableError: the weights fit neither into host memory nor onto the device.
    """
    verify(checkpoint, cache)
    asked = {"place": _place(checkpoint, dtype), "files": identity(checkpoint)}

    def build() -> dict[str, Any]:
        building()
        request = {
            "checkpoint": checkpoint.to_json(),
            "dtype": dtype,
            "device": _device(checkpoint, dtype, device, name),
            "trust_remote_code": trust_remote_code,
            "asked": asked,
        }
        return run_apart("ladezeit.validation.content.reference", request, f"model={name}")

    return kept.ensure(cache / FOLDER, name, asked, build)


def reference_load(folder: str, dtype: str, device: str, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Return what `from_pretrained` makes of a folder on one device, and what it says about its keys.

    Raises:
        CheckpointError: it had to make up values.
    """
    import torch
    from transformers import AutoModelForCausalLM

    placed = {} if device == "cpu" else {"device_map": {"": device}}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, local_files_only=True, **placed, **arguments
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
        str(checkpoint.folder),
        request["dtype"],
        request["device"],
        trust_remote_code=request["trust_remote_code"],
    )
    held = inventory(model)
    grouped = groups(held)
    found: dict[str, str] = {}
    by_first = digests({group[0].name: group[0].tensor for group in grouped})
    for group in grouped:
        found.update({one.name: by_first[group[0].name] for one in group})
    anchors = anchor(checkpoint, held, found)
    if identity(checkpoint) != request["asked"]["files"]:
        raise CheckpointError(f"the files in {checkpoint.folder} changed while their manifest was made: try again")
    entries = {
        one.name: Entry(
            found[one.name], str(one.tensor.dtype).removeprefix("torch."), tuple(one.tensor.shape), one.kind
        )
        for one in held
    }
    ties = [[one.name for one in group] for group in grouped if len(group) > 1]
    origin = {**request["asked"]["place"], "device": request["device"], "dropped": sorted(info["unexpected_keys"])}
    return Manifest(entries, ties, anchors.counts, anchors.unanchored, origin).to_plain()


def _place(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "folder": str(checkpoint.folder),
        "dtype": dtype,
        "quantization": checkpoint.config.get("quantization_config"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "arithmetic": ARITHMETIC,
    }


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
