"""`ladezeit-verify` answers in a shell, and by its exit code, whether two checkpoints hold one model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import load_file, save_file

from ladezeit.cli.verify import app
from ladezeit.errors import ConfigError


def verify(*words: str) -> int:
    try:
        result = typer.main.get_command(app)(list(words), standalone_mode=False)
    except typer.Exit as end:
        return end.exit_code
    return int(result or 0)


def test_a_copy_holds_the_same_and_a_flipped_bit_does_not(
    own_tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], warm_references: None
) -> None:
    copy = Path(shutil.copytree(own_tiny.folder, tmp_path / "copy"))
    assert verify(str(copy), "--against", str(own_tiny.folder), "--device", "cpu") == 0
    assert "passed" in capsys.readouterr().out
    shard = copy / own_tiny.shards[0].name
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    assert verify(str(copy), "--against", str(own_tiny.folder), "--device", "cpu") == 1
    said = capsys.readouterr().out
    assert "differs" in said and f"content {name}: is not what the checkpoint holds" in said


def test_a_dtype_is_asked_of_both(own_tiny: Any, warm_references: None) -> None:
    assert verify(str(own_tiny.folder), "--dtype", "float16", "--device", "cpu", "--loading", "transformers") == 0


def test_a_name_that_is_none_is_usage() -> None:
    with pytest.raises(ConfigError, match="neither configured"):
        verify("tinny")
