"""A ``.bin`` checkpoint is loaded only where loading it cannot execute anything."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

from checkpoint_files import write_json
from ladezeit.checkpoint.resolve import inspect_checkpoint
from ladezeit.errors import CheckpointError


class Attack:
    """Unpickled, creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    return tmp_path


def save(path: Path, content: Any, **options: Any) -> None:
    import torch

    torch.save(content, path, **options)


def test_plain_tensors_are_found_with_their_bytes(folder: Path) -> None:
    """A safe pickle is a checkpoint like another: names, shapes, dtypes, and where the bytes are."""
    import torch

    tensors = {"z": torch.arange(5.0), "a": torch.ones(2, 3, dtype=torch.bfloat16), "tied": None}
    tensors["tied"] = tensors["z"]
    save(folder / "pytorch_model.bin", tensors)
    found = inspect_checkpoint(folder, "mine")
    content = (folder / "pytorch_model.bin").read_bytes()
    assert [(t.name, t.dtype, t.shape) for t in found.tensors] == [
        ("z", "F32", (5,)),
        ("a", "BF16", (2, 3)),
        ("tied", "F32", (5,)),
    ]
    assert content[found.tensors[0].begin : found.tensors[0].end] == torch.arange(5.0).numpy().tobytes()
    assert (found.file_format, found.dtype, found.weight_bytes) == ("pickle", "float32", 32)


def test_shards_with_an_index_are_checked_together(folder: Path) -> None:
    """An index of pickles is held to the same rules as one of safetensors."""
    import torch

    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for name, tensor in zip(names, "ab", strict=True):
        save(folder / name, {tensor: torch.zeros(2)})
    weight_map = {"a": names[0], "b": names[1]}
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    assert [(t.name, t.shard) for t in inspect_checkpoint(folder, "mine").tensors] == [("a", 0), ("b", 1)]
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map | {"b": names[0]}})
    with pytest.raises(CheckpointError, match="index and shards disagree"):
        inspect_checkpoint(folder, "mine")


@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "hidden"])
def test_a_pickle_that_would_execute_something_is_refused_unexecuted(folder: Path, form: str) -> None:
    """The message names what it would have called; the call does not happen."""
    target = folder / "executed"
    path = folder / "pytorch_model.bin"
    if form == "bare":
        path.write_bytes(pickle.dumps({"a": Attack(target)}))
    else:
        save(path, {"a": Attack(target)}, _use_new_zipfile_serialization=form != "legacy")
    if form == "hidden":  # protocol 4 puts the name on the stack, where a plain scan for globals misses it
        rewrite(path, pickle.dumps({"a": Attack(target)}, protocol=4))
    with pytest.raises(CheckpointError) as error:
        inspect_checkpoint(folder, "mine")
    assert "not safe to load" in str(error.value)
    assert "nothing of it was executed" in str(error.value)
    assert "system" in str(error.value)
    assert not target.exists()


def rewrite(path: Path, content: bytes) -> None:
    """Replace the pickle inside torch's zip file."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, content if name.endswith("data.pkl") else data)


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1_000_000)


def truncated(path: Path) -> None:
    save(path, {})
    os.truncate(path, path.stat().st_size - 30)


def nested(path: Path) -> None:
    save(path, {"state_dict": {}})


def a_list(path: Path) -> None:
    save(path, [1, 2])


def transposed(path: Path) -> None:
    import torch

    save(path, {"a": torch.ones(2, 3).T})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (compressed, "compressed data"),
        (truncated, "no file of torch.save"),
        (nested, "is dict, not a plain tensor"),
        (a_list, "not a mapping of names to tensors"),
        (transposed, "plain consecutive values"),
    ],
)
def test_other_contents_are_refused_by_name(folder: Path, make: Any, message: str) -> None:
    """What `from_pretrained` could not use, or what could be a bomb, is refused before anything is loaded."""
    make(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(folder, "mine")


def test_the_checker_survives_a_python_file_in_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ``torch.py`` beside the checkpoint is not what gets imported."""
    save(folder / "pytorch_model.bin", {"a": __import__("torch").zeros(1)})
    (folder / "torch.py").write_text("raise SystemExit('hijacked')")
    (folder / "json.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(folder)
    assert json.loads(json.dumps(inspect_checkpoint(folder, "mine").to_json()))["file_format"] == "pickle"
