"""The life of a manifest: made once, used while the files stay as they are, made again when they do not."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from proven_checkpoints import UP, flip_in_file, made, manifest_of, own_copy
from safetensors.torch import load_file, save_file

from ladezeit.checkpoint.resolve import Checkpoint, inspect_checkpoint
from ladezeit.errors import CheckpointError
from ladezeit.validation import manifest, reference_cache
from ladezeit.validation.manifest import FOLDER, _device


class Counted:
    """Counts how often a manifest was made."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Checkpoint:
    return own_copy(made("tied", cache), tmp_path / "copy")


def test_it_is_made_once_and_again_when_the_files_are_others(copy: Checkpoint, tmp_path: Path) -> None:
    """A reference load costs seconds: once for each checkpoint as it is, and never a stale measure."""
    building, own_cache = Counted(), tmp_path / "cache"
    first = manifest_of(copy, own_cache, building=building)
    before = manifest.read_manifest(first)
    assert manifest_of(copy, own_cache, building=building) == first
    assert building.times == 1
    tensors = load_file(copy.shards[0])
    tensors[UP] = tensors[UP] + 1
    save_file(tensors, copy.shards[0], metadata={"format": "pt"})
    again = manifest_of(inspect_checkpoint(copy.folder, "copy"), own_cache, building=building)
    after = manifest.read_manifest(again)
    assert (building.times, again) == (2, first)
    assert {name for name in before.tensors if before.tensors[name] != after.tensors[name]} == {UP}
    assert len(list((own_cache / FOLDER).glob("*.json"))) == 1


def test_another_dtype_is_another_manifest(cache: Path) -> None:
    """What float32 must hold says nothing of what bfloat16 must hold."""
    checkpoint = made("tied", cache)
    one, other = manifest_of(checkpoint, cache), manifest_of(checkpoint, cache, "float32")
    assert one != other
    assert manifest.read_manifest(other).tensors[UP].dtype == "float32"


def test_it_lists_every_name_with_ties_and_kinds(cache: Path) -> None:
    """Parameters under all their names, and buffers that no file holds."""
    said = manifest.read_manifest(manifest_of(made("tied", cache), cache))
    assert said.ties == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert said.tensors["lm_head.weight"] == said.tensors["model.embed_tokens.weight"]
    assert said.tensors["model.rotary_emb.inv_freq"].kind == "computed"
    assert said.tensors[UP].kind == "parameter"
    assert manifest.Manifest.from_plain(said.to_plain()) == said


@pytest.mark.parametrize("damage", ["", "{}\n{}\n", '{"schema": 1', "one byte"])
def test_a_damaged_file_is_made_again_and_never_believed(copy: Checkpoint, tmp_path: Path, damage: str) -> None:
    """A manifest that lies would call right models wrong, or wrong ones right."""
    building = Counted()
    file = manifest_of(copy, tmp_path / "cache", building=building)
    content = file.read_text()
    file.write_text(content.replace(UP, UP.replace("1", "2"), 1) if damage == "one byte" else damage)
    with pytest.raises(CheckpointError, match="Remove it, and it is made again"):
        manifest.read_manifest(file)
    assert manifest_of(copy, tmp_path / "cache", building=building) == file
    assert building.times == 2
    assert file.read_text() == content


def test_of_several_processes_one_makes_it(tmp_path: Path) -> None:
    """Parallel jobs wait for the one that loads; all get the same file, whole."""
    script = (
        "import sys, time; from pathlib import Path; from ladezeit.validation import reference_cache\n"
        "def build():\n"
        "    print('made', flush=True); time.sleep(1); return {'a': 1}\n"
        "print(reference_cache.ensure_file(Path(sys.argv[1]), 'x', {'place': 'here', 'files': 1}, build))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "kept")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=60)[0].split() for process in started]
    assert sum(words.count("made") for words in said) == 1
    assert len({words[-1] for words in said}) == 1
    assert reference_cache.read_file(Path(said[0][-1])) == {"a": 1}


def test_nothing_is_left_of_one_that_could_not_be_made(tmp_path: Path) -> None:
    """The next try starts from nothing."""

    def fails() -> dict[str, Any]:
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        reference_cache.ensure_file(tmp_path, "x", {"place": 1}, fails)
    assert list(tmp_path.glob("*.json")) == []
    assert reference_cache.read_file(reference_cache.ensure_file(tmp_path, "x", {"place": 1}, lambda: {"b": 2})) == {
        "b": 2
    }


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """What is there is used; what is not is refused with the cure, before anything is loaded."""
    there = reference_cache.ensure_file(tmp_path / "kept", "x", {"place": 1}, lambda: {"b": 2})
    blocked = tmp_path / "file"
    blocked.write_text("")
    for path in (there.parent, tmp_path):
        path.chmod(0o555)
    try:
        assert (
            reference_cache.ensure_file(tmp_path / "kept", "x", {"place": 1}, lambda: pytest.fail("made again"))
            == there
        )
        with pytest.raises(CheckpointError, match="LADEZEIT_CACHE"):
            reference_cache.ensure_file(blocked / "kept", "x", {"place": 1}, lambda: {})
    finally:
        tmp_path.chmod(0o755)
        there.parent.chmod(0o755)


def hub_layout(checkpoint: Checkpoint, folder: Path, sha256: Callable[[bytes], str]) -> Checkpoint:
    """Lay a checkpoint out as the hub's cache does: the shard is a link to a blob that is called by its sha256."""
    snapshot, blobs = folder / "snapshots" / "abc", folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in checkpoint.folder.iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            blob = blobs / sha256(content)
            blob.write_bytes(content)
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
        else:
            (snapshot / path.name).write_bytes(content)
    return inspect_checkpoint(snapshot, "hub")


def test_a_file_that_is_not_what_the_hub_has_is_reported(cache: Path, tmp_path: Path) -> None:
    """The hub's own sha256 is checked once and remembered; damage is named with file and cure, before any load."""
    import hashlib

    from ladezeit.checkpoint.verify import checkpoint_identity, promised_sha256, verify

    own_cache = tmp_path / "cache"
    checkpoint = hub_layout(
        made("tied", cache), tmp_path / "models--a--b", lambda content: hashlib.sha256(content).hexdigest()
    )
    assert checkpoint_identity(checkpoint)["shards"] == [{"sha256": promised_sha256(checkpoint.shards[0])}]
    assert verify(checkpoint, own_cache) == 1
    notes = list((own_cache / "verified").iterdir())
    os.utime(notes[0], ns=(1, 1))
    assert verify(checkpoint, own_cache) == 1
    assert notes[0].stat().st_mtime_ns == 1  # not checked a second time
    blob = checkpoint.shards[0].resolve()
    times = blob.stat()
    flip_in_file(checkpoint, UP)
    os.utime(blob, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match=r"is damaged: the hub has the sha256 .* fetch the checkpoint again"):
        manifest_of(checkpoint, own_cache, building=lambda: pytest.fail("was loaded"))


def test_a_file_without_a_promise_has_none(cache: Path) -> None:
    """A local folder is known by size, times, inode and samples."""
    from ladezeit.checkpoint.verify import checkpoint_identity, promised_sha256, verify

    checkpoint = made("tied", cache)
    assert promised_sha256(checkpoint.shards[0]) is None
    assert verify(checkpoint, cache) == 0
    assert set(checkpoint_identity(checkpoint)["shards"][0]) == {"bytes", "modified_ns", "inode", "samples"}


def test_a_model_larger_than_the_host_is_loaded_where_the_run_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference goes to the GPU where only that has room; without one the refusal says what to do."""
    from ladezeit.errors import NotRunnableError

    checkpoint = made("tied", cache)
    assert _device(checkpoint, "bfloat16", "cuda:0", "m") == "cpu"
    monkeypatch.setattr(manifest, "available_memory_bytes", lambda: 10**9)
    assert _device(checkpoint, "bfloat16", "cuda:0", "m") == "cuda:0"
    with pytest.raises(NotRunnableError, match="GiB of host memory"):
        _device(checkpoint, "bfloat16", "cpu", "m")


def test_a_tensor_that_the_model_leaves_out_does_not_stop_the_proof(cache: Path, tmp_path: Path) -> None:
    """Old files hold what newer models compute: the rest is proven as ever."""
    copy = own_copy(made("tied", cache), tmp_path / "copy")
    tensors = load_file(copy.shards[0])
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, copy.shards[0], metadata={"format": "pt"})
    said = manifest.read_manifest(manifest_of(inspect_checkpoint(copy.folder, "copy"), tmp_path / "cache"))
    assert said.unanchored == []
