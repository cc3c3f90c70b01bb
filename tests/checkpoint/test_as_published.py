"""Folders as people have them: linked caches, adapters, variants, old files; each is read, or told what it is."""

import os
from collections import OrderedDict
from pathlib import Path

import pytest

from checkpoint_files import sharded, single, write_json, write_shard
from ladezeit.checkpoint.resolve import inspect_checkpoint
from ladezeit.errors import CheckpointError


def snapshot(home: Path, blobs: Path) -> Path:
    """A snapshot in a hub cache whose files are links into `blobs`."""
    folder = home / "models--org--name" / "snapshots" / "0123"
    single(folder)
    for path in list(folder.iterdir()):
        path.rename(blobs / f"blob-of-{path.name}")
        path.symlink_to(Path("..") / ".." / "blobs" / f"blob-of-{path.name}")
    return folder


def test_a_blobs_folder_that_is_a_link_is_followed(tmp_path: Path) -> None:
    """A cache whose blobs lie on another disk is read, as the library reads it."""
    store = tmp_path / "store"
    store.mkdir()
    (tmp_path / "hub" / "models--org--name").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--name" / "blobs").symlink_to(store)
    assert len(inspect_checkpoint(snapshot(tmp_path / "hub", store), "name").tensors) == 2


def test_a_blob_that_is_a_link_to_a_store_is_followed(tmp_path: Path) -> None:
    """A cache that shares its blobs with others by links is read, as the library reads it."""
    blobs, store = tmp_path / "hub" / "models--org--name" / "blobs", tmp_path / "store"
    blobs.mkdir(parents=True)
    store.mkdir()
    folder = snapshot(tmp_path / "hub", blobs)
    for blob in list(blobs.iterdir()):
        blob.rename(store / blob.name)
        blob.symlink_to(store / blob.name)
    assert len(inspect_checkpoint(folder, "name").tensors) == 2


@pytest.mark.parametrize("target", ["/etc/hostname", "../../../../outside.json", "../../blobs/../../../outside.json"])
def test_a_link_of_a_snapshot_past_its_blobs_is_refused(target: str, tmp_path: Path) -> None:
    """What a checkpoint brings cannot name files of the machine."""
    (tmp_path / "hub" / "models--org--name" / "blobs").mkdir(parents=True)
    (tmp_path / "outside.json").write_text("{}")
    folder = single(tmp_path / "hub" / "models--org--name" / "snapshots" / "0123")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(target)
    with pytest.raises(CheckpointError, match="outside its folder"):
        inspect_checkpoint(folder, "name")


def test_an_adapter_alone_is_told(tmp_path: Path) -> None:
    """Who gives an adapter's folder reads that it is one."""
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "org/name"})
    write_shard(tmp_path / "adapter_model.safetensors", a=1)
    with pytest.raises(CheckpointError, match="it is an adapter"):
        inspect_checkpoint(tmp_path, "name")


def test_a_gguf_alone_is_told(tmp_path: Path) -> None:
    """Who gives a folder with a GGUF file reads what to do with it."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="GGUF"):
        inspect_checkpoint(tmp_path, "name")


@pytest.mark.parametrize("name", ["model.fp16.safetensors"])
def test_a_variant_alone_is_told(name: str, tmp_path: Path) -> None:
    """Who has a single variant of the weights is not sent for an index that was never there."""
    write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    write_shard(tmp_path / name, a=1)
    with pytest.raises(CheckpointError, match="variant 'fp16' alone"):
        inspect_checkpoint(tmp_path, "name")


def test_what_was_published_wrong_is_not_only_to_be_fetched_again(tmp_path: Path) -> None:
    """Who fetched rightly what is wrong in itself is not sent in circles."""
    folder = sharded(tmp_path / "model")
    write_shard(folder / "model-00002-of-00002.safetensors", b=2)
    with pytest.raises(CheckpointError, match="only its publisher"):
        inspect_checkpoint(folder, "name")


def test_an_old_file_of_tensors_alone_is_not_called_unsafe(tmp_path: Path) -> None:
    """A `.bin` in torch's old format is told from one that would run code."""
    import torch

    write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    tensors = OrderedDict(a=torch.zeros(2), b=torch.ones(3, dtype=torch.bfloat16))
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="it holds tensors alone") as caught:
        inspect_checkpoint(tmp_path, "name")
    assert "not safe" not in str(caught.value)


def test_a_config_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    """A hostile folder does not make anybody wait for ever."""
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        inspect_checkpoint(tmp_path, "name")
