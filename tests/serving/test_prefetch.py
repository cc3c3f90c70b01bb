"""A model's files are in the page cache when a program wants them there, and out when it does not; both verified."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ladezeit
from configs_for_tests import model_config
from ladezeit.checkpoint.resolve import Checkpoint, prepare_checkpoint
from ladezeit.cli.cache import NOT_SO, app, main
from ladezeit.config import SyntheticModel
from ladezeit.errors import USAGE, CheckpointError, ConfigError, NotRunnableError
from sparse_checkpoints import four_terabytes


@pytest.fixture
def shards(cache: Path) -> Iterator[Checkpoint]:
    """A checkpoint of several files that no other test looks at."""
    shape = model_config("tiny").architecture
    yield prepare_checkpoint(
        SyntheticModel(name="tiny-prefetch", architecture=shape, seed=3, shard_bytes=900_000), cache
    )


def test_what_was_evicted_is_brought_back_once(shards: Checkpoint) -> None:
    """Before a planned start the files are read ahead of it, and a second time costs nothing."""
    gone = ladezeit.evict(shards.folder)
    if not gone.is_cold:
        pytest.skip("the files lie on a file system that is memory")
    told: list[tuple[str, int, int]] = []
    there = ladezeit.prefetch(shards.folder, progress=lambda *state: told.append(state))
    assert there.is_warm and there.before_share < 0.5, "of so small a model the headers alone are a share"
    assert 0.9 * shards.file_bytes < there.read_bytes <= shards.file_bytes == there.file_bytes
    assert told[-1][1] == told[-1][2] == there.read_bytes
    again = ladezeit.prefetch(shards.folder)
    assert again.is_warm and again.read_bytes == 0 and again.files == shards.shards


def test_the_rate_is_a_limit(shards: Checkpoint) -> None:
    """A prefetch leaves the disk to those who are served meanwhile: it takes as long as its rate says, at least."""
    if not ladezeit.evict(shards.folder).is_cold:
        pytest.skip("the files lie on a file system that is memory")
    found = ladezeit.prefetch(shards.folder, rate=10e6)
    assert found.seconds >= found.read_bytes / 10e6 > 0.2
    with pytest.raises(ConfigError, match="would never end"):
        ladezeit.prefetch(shards.folder, rate=0)


def test_what_does_not_fit_into_memory_is_not_read(tiny: Any, tmp_path: Path) -> None:
    """Reading more than the memory holds would push out what was read first, and everything else."""
    with pytest.raises(NotRunnableError, match="Nothing was read"):
        ladezeit.prefetch(four_terabytes(tiny, tmp_path / "large"))


def test_what_a_process_has_mapped_stays_and_is_said_to(shards: Checkpoint) -> None:
    """`evict` never claims what it did not do."""
    loaded = ladezeit.load(shards.folder, loading="safetensors_mmap", device="cpu")
    assert not ladezeit.evict(shards.folder).is_cold
    assert loaded.verification.passed


def test_the_converted_files_are_meant_where_the_method_reads_those(shards: Checkpoint) -> None:
    """A prefetch of files that nobody will read helps nobody."""
    found = ladezeit.prefetch(shards.folder, loading="gguf")
    assert [path.suffix for path in found.files] == [".gguf"] and found.is_warm


def test_a_model_that_is_not_here_is_not_fetched_to_be_evicted(tmp_path: Path) -> None:
    """`evict` of a wrong name says so, and downloads nothing."""
    with pytest.raises(CheckpointError, match="is not on this machine"):
        ladezeit.evict(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="Did you mean 'tiny'"):
        ladezeit.evict("tinny")


def test_the_commands_do_and_show_the_same(
    shards: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operator sees what is in memory and what lies on the disk, and scripts see it in the exit code."""
    run = CliRunner().invoke
    folder = str(shards.folder)
    prefetched = run(app, ["prefetch", folder, "--rate-mb-per-s", "500"])
    assert prefetched.exit_code == 0 and "100.0 % of 0.004 GB in memory" in prefetched.output
    shown = run(app, ["status", folder])
    assert shown.exit_code == 0 and str(shards.shards[-1]) in shown.output.replace("\n", "")
    evicted = run(app, ["evict", folder])
    assert evicted.exit_code in (0, NOT_SO) and "100.0 % before" in evicted.output
    listed = run(app, ["list"])
    assert listed.exit_code == 0 and shards.folder.name in listed.output and "synthetic" in listed.output
    monkeypatch.setattr(sys, "argv", ["ladezeit-cache", "status", "tinny"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == USAGE and "Did you mean 'tiny'" in capsys.readouterr().err
