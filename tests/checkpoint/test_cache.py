"""Made checkpoints on a disk that is full, or read-only: nothing half-written, and what is there is used."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ladezeit.checkpoint.cache import Recipe, build_entry, check_space, find_entry
from ladezeit.errors import CheckpointError

RECIPE = Recipe(name="mine", kind="test", identity={"version": 1})


def quiet(what: str, done: int, total: int) -> None:
    """Tell nobody."""


def fill(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 2_000_000)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this container may not mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_leaves_nothing(small_disk: Path) -> None:
    """The message says which disk is full and how to use another; the space is free again."""
    with pytest.raises(CheckpointError, match=r"is full: \d+ bytes are free.*LADEZEIT_CACHE"):
        build_entry(small_disk, RECIPE, fill, quiet)
    assert [path.name for path in small_disk.iterdir()] == [f".{RECIPE.folder_name}.lock"]
    free = os.statvfs(small_disk)
    assert free.f_bavail * free.f_frsize > 900_000


def test_what_does_not_fit_is_not_begun(small_disk: Path) -> None:
    """Known to be too large, it is refused with both numbers."""
    with pytest.raises(CheckpointError, match=r"needs 5000000 bytes .* free"):
        check_space(small_disk, 5_000_000)
    check_space(small_disk, 0)


def test_a_read_only_cache_serves_what_it_has(tmp_path: Path, small_disk: Path) -> None:
    """A cache filled beforehand and mounted read-only works; making something new in it is refused by name."""

    def little(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    made = build_entry(small_disk, RECIPE, little, quiet)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert build_entry(small_disk, RECIPE, fill, quiet) == made == find_entry(small_disk, RECIPE)
    with pytest.raises(CheckpointError, match="cannot be written"):
        build_entry(small_disk, Recipe("other", "test", {}), little, quiet)


def test_an_error_while_making_leaves_nothing(tmp_path: Path) -> None:
    """Whatever goes wrong, the next run starts from a clean folder."""

    def fail(folder: Path) -> None:
        fill(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build_entry(tmp_path, RECIPE, fail, quiet)
    assert [path.name for path in tmp_path.iterdir()] == [f".{RECIPE.folder_name}.lock"]
    assert find_entry(tmp_path, RECIPE) is None
