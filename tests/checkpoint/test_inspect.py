"""A folder is a whole checkpoint, or the user is told in one message what is missing and what to do."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_files import python, sharded, single, write_json, write_shard
from ladezeit.checkpoint.resolve import Checkpoint, inspect_checkpoint, locate_checkpoint, prepare_checkpoint
from ladezeit.config import FolderModel
from ladezeit.errors import CheckpointError
from ladezeit.system.files import cache_folder

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_a_whole_folder_is_described(tmp_path: Path) -> None:
    """Engines, proofs and ceilings get shards, offsets, sizes and dtype from here."""
    found = inspect_checkpoint(sharded(tmp_path), "mine")
    assert [shard.name for shard in found.shards] == [FIRST, SECOND]
    assert {(tensor.name, tensor.shard, tensor.end - tensor.begin) for tensor in found.tensors} == {
        ("a", 0, 16),
        ("b", 1, 8),
        ("c", 1, 4),
    }
    assert (found.weight_bytes, found.file_format, found.dtype, found.has_tokenizer) == (
        28,
        "safetensors",
        "float32",
        False,
    )
    assert found.file_bytes == sum(shard.stat().st_size for shard in found.shards)


def test_it_travels_to_the_worker_whole(tmp_path: Path) -> None:
    """The worker loads what the supervisor looked at."""
    found = inspect_checkpoint(sharded(tmp_path), "mine")
    assert Checkpoint.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_folder_model_is_prepared_as_it_is(tmp_path: Path) -> None:
    """``ladezeit model=folder model.path=…`` reads and changes nothing."""
    single(tmp_path / "mine")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "mine").iterdir())
    model = FolderModel(name="folder", path=str(tmp_path / "mine"))
    assert (
        prepare_checkpoint(model, tmp_path / "cache").folder
        == locate_checkpoint(model, tmp_path / "cache")
        == tmp_path / "mine"
    )
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "mine").iterdir()) == before
    assert not (tmp_path / "cache").exists()
    assert locate_checkpoint(FolderModel(name="folder", path=str(tmp_path / "none")), tmp_path) is None


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def cut(folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)


def edit(**changes: Any) -> Callable[[Path], None]:
    """Replace parts of the index; ``weight_map`` is merged, and a None in it removes the tensor."""

    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        if isinstance(changes.get("weight_map"), dict):
            merged = {**index["weight_map"], **changes["weight_map"]}
            changes["weight_map"] = {name: file for name, file in merged.items() if file is not None}
        write_json(folder / INDEX, {**index, **changes})

    return apply


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def twice(folder: Path) -> None:
    write_shard(folder / SECOND, a=4, b=2, c=1)


def link_away(folder: Path) -> None:
    (folder / FIRST).rename(folder.parent / "elsewhere.safetensors")
    (folder / FIRST).symlink_to(folder.parent / "elsewhere.safetensors")


def pipe(folder: Path) -> None:
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)


def no_tensors(folder: Path) -> None:
    write_shard(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (remove("config.json"), "has no config.json"),
        (text("config.json", "{"), "config.json is not valid JSON"),
        (text("config.json", "[]"), "expected an object"),
        (text("config.json", '{"dtype": "int7"}'), "gives the dtype int7"),
        (remove(INDEX), f"neither model.safetensors nor the index {INDEX}"),
        (remove(INDEX, FIRST, SECOND), "holds no weights"),
        (no_tensors, "has no tensors"),
        (remove(SECOND), "which is missing"),
        (cut, "is truncated"),
        (twice, "stands in model-00001-of-00002.safetensors too"),
        (text(INDEX, "{"), "not valid JSON"),
        (text(INDEX, '{"weight_map": {}, "metadata": {}}'), "is malformed: weight_map"),
        (edit(weight_map=["a"]), "is malformed: weight_map"),
        (edit(metadata=3), "is malformed: metadata"),
        (edit(weight_map={"a": 1}), "is malformed: weight_map"),
        (edit(weight_map={"a": "../model.safetensors"}), "lies outside its folder"),
        (edit(weight_map={"a": "/etc/x.safetensors"}), "lies outside its folder"),
        (edit(weight_map={"a": "config.json"}), "which is not a .safetensors file"),
        (edit(weight_map={"a": SECOND}), "tensor 'a' is said to be in"),
        (
            edit(weight_map={"d": SECOND}),
            "tensor 'd' is said to be in model-00002-of-00002.safetensors and is in no file",
        ),
        (edit(weight_map={"c": None}), "tensor 'c' is said to be in no file"),
        (link_away, "is a link to"),
        (pipe, "is not a regular file"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    """One message: which model, which file, what is wrong with it."""
    damage(sharded(tmp_path / "mine"))
    with pytest.raises(CheckpointError) as error:
        inspect_checkpoint(tmp_path / "mine", "my-model")
    assert message in str(error.value)
    assert str(error.value).startswith("model=my-model: ")
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "it is an adapter"),
        (["model.gguf"], "GGUF"),
        (["model-00001-of-00003.safetensors"], "Fetch the index too"),
    ],
)
def test_common_mistakes_get_their_own_hint(tmp_path: Path, files: list[str], hint: str) -> None:
    """An adapter, a GGUF or a half-copied folder is called what it is."""
    for name in ("config.json", *files):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=hint):
        inspect_checkpoint(tmp_path, "mine")


def test_a_folder_one_too_high_is_recognised(tmp_path: Path) -> None:
    """Who gives the folder above the checkpoint is told its name."""
    single(tmp_path / "inner")
    with pytest.raises(CheckpointError, match="found one in inner"):
        inspect_checkpoint(tmp_path, "mine")


def test_links_of_the_hub_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    """The hub's cache links each file to its blobs folder; a link to anywhere else is somebody's trick."""
    repository = tmp_path / "models--someone--something"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    sharded(snapshot)
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert inspect_checkpoint(snapshot, "mine").weight_bytes == 28
    (tmp_path / "alias").symlink_to(snapshot)
    assert inspect_checkpoint(tmp_path / "alias", "mine").weight_bytes == 28


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    """Where both are there, the pickle is not even looked at."""
    (single(tmp_path) / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
    assert inspect_checkpoint(tmp_path, "mine").file_format == "safetensors"


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    """A copy is the same checkpoint; another value of one weight, or another config, is another."""
    first = inspect_checkpoint(single(tmp_path / "one"), "a").fingerprint
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert inspect_checkpoint(tmp_path / "copy", "b").fingerprint == first
    assert inspect_checkpoint(single(tmp_path / "config", rope_theta=2), "c").fingerprint != first
    write_shard(tmp_path / "copy" / "model.safetensors", b=[1.0, 2.5], a=np.arange(6, dtype=np.float16).reshape(2, 3))
    assert inspect_checkpoint(tmp_path / "copy", "d").fingerprint != first


@pytest.mark.parametrize("names", [["tokenizer.json"], ["tokenizer.model"], ["vocab.json", "merges.txt"]])
def test_a_tokenizer_is_noticed(tmp_path: Path, names: list[str]) -> None:
    """With a tokenizer the prompt is text, without one it is numbers."""
    single(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not inspect_checkpoint(tmp_path, "mine").has_tokenizer
    for name in names:
        (tmp_path / name).write_text("{}")
    assert inspect_checkpoint(tmp_path, "mine").has_tokenizer


@pytest.mark.parametrize(
    "config", [{"dtype": "float16"}, {"torch_dtype": "bfloat16"}, {"dtype": "float32", "torch_dtype": "float16"}, {}]
)
def test_the_dtype_is_the_one_that_transformers_picks(tmp_path: Path, config: dict[str, str]) -> None:
    """``loading.dtype=auto`` is checked against this."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=32, num_key_value_heads=1, **sizes)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", {key: value for key, value in saved.items() if key != "dtype"} | config)
    picked = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype
    assert inspect_checkpoint(tmp_path, "mine").dtype == str(picked).removeprefix("torch.")


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LADEZEIT_CACHE, then XDG_CACHE_HOME, then the home folder."""
    monkeypatch.setenv("LADEZEIT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LADEZEIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/ladezeit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/ladezeit")


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    """The supervisor starts in a fraction of a second, and stays free of torch."""
    code = """
import sys
from pathlib import Path
from ladezeit.system import page_cache; from ladezeit.checkpoint import resolve
resolve.inspect_checkpoint(Path(sys.argv[1]), "mine")
print(sorted({"torch", "transformers", "mlflow", "huggingface_hub", "safetensors", "gguf"} & set(sys.modules)))
"""
    assert python(code, single(tmp_path)).stdout.strip() == "[]"
