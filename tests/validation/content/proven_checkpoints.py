"""Checkpoints of tiny models and their manifests, made by real reference loads."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs_for_tests import TINY_MOE, model_config
from ladezeit.checkpoint.resolve import Checkpoint, inspect_checkpoint, prepare_checkpoint
from ladezeit.validation.manifest import manifest_file
from ladezeit.validation.reference_cache import ReferenceKey

UP = "model.layers.1.mlp.up_proj.weight"


def made(kind: str, cache: Path) -> Checkpoint:
    """Return the checkpoint of a tiny model: ``tied``, ``untied``, ``shards`` or ``experts``."""
    model = model_config("tiny")
    if kind == "untied":
        model.name, model.architecture = "tiny-untied", {**model.architecture, "tie_word_embeddings": False}
    elif kind == "shards":
        model.name, model.shard_bytes = "tiny-shards", 500_000
    elif kind == "experts":
        model.name, model.architecture = "tiny-experts", TINY_MOE
    return prepare_checkpoint(model, cache)


def own_copy(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return a copy of a checkpoint that a test may damage."""
    shutil.copytree(checkpoint.folder, folder)
    return inspect_checkpoint(folder, "copy")


def manifest_of(
    checkpoint: Checkpoint,
    cache: Path,
    dtype: str = "bfloat16",
    building: Callable[[], None] = lambda: None,
    **changes: Any,
) -> Path:
    """Return the manifest's file, made by a real reference load where it is not there."""
    asked = {"device": "cpu", "hardware": "this", **changes}
    return manifest_file(ReferenceKey(checkpoint, "test", dtype, cache=cache, **asked), building)


def flip_in_file(checkpoint: Checkpoint, name: str) -> None:
    """Flip one bit of a tensor in its file and leave the file's times as they were, as a failing disk does."""
    entry = next(entry for entry in checkpoint.tensors if entry.name == name)
    path = checkpoint.shards[entry.shard]
    before = path.stat()
    with path.open("r+b") as shard:
        shard.seek((entry.begin + entry.end) // 2)
        byte = shard.read(1)[0]
        shard.seek(-1, 1)
        shard.write(bytes([byte ^ 16]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
