"""Synthetic checkpoints are the same everywhere, made once, and never half there."""

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from checkpoint_files import QWEN2, QWEN3_MOE, interrupt, python, started, wait_for
from ladezeit.checkpoint import synthetic
from ladezeit.checkpoint.resolve import inspect_checkpoint, locate_checkpoint, prepare_checkpoint
from ladezeit.config import SyntheticModel
from ladezeit.errors import CheckpointError, ConfigError

TINY = SyntheticModel(name="tiny", architecture=QWEN2)
#: Large enough to be caught in the middle of being written: 0.7 GB.
LARGE = {**QWEN2, "hidden_size": 2048, "vocab_size": 160_000, "num_hidden_layers": 1}
#: Makes LARGE in the cache that the first argument names; prints what it is told, at most once a word.
MAKE = f"""
import sys
from pathlib import Path
from ladezeit.checkpoint.resolve import prepare_checkpoint
from ladezeit.config import SyntheticModel
said = set()
def told(what, done, total):
    if what.split()[0] not in said:
        said.add(what.split()[0])
        print(what, flush=True)
print(prepare_checkpoint(SyntheticModel(name="large", architecture={LARGE!r}), Path(sys.argv[1]), told).fingerprint)
"""


def visible(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_bits_are_the_same_on_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results measured on a synthetic model elsewhere are about the same bytes; threads and batches do not matter."""
    expected = "e8cf0393a965ef8b4e111db3b48f399915f12eb71f6259dca9fe9142a241923e"
    assert sha256(prepare_checkpoint(TINY, tmp_path / "a").folder) == expected
    monkeypatch.setattr(synthetic, "_MOST_THREADS", 1)
    monkeypatch.setattr(synthetic, "_BATCH", 1)
    assert sha256(prepare_checkpoint(TINY, tmp_path / "b").folder) == expected
    monkeypatch.setattr(synthetic, "_LEAST_THREADS", 16)
    monkeypatch.setattr(synthetic, "_MOST_THREADS", 16)
    assert sha256(prepare_checkpoint(TINY, tmp_path / "c").folder) == expected


def test_chunks_do_not_repeat_one_another(tmp_path: Path) -> None:
    """A tensor longer than one chunk is random throughout, so that no file system or loader can fold it."""
    wide = {**QWEN2, "vocab_size": 3 * synthetic._CHUNK // 64, "num_hidden_layers": 1}
    found = prepare_checkpoint(SyntheticModel(name="s", architecture=wide), tmp_path)
    entry = next(tensor for tensor in found.tensors if tensor.name == "model.embed_tokens.weight")
    raw = found.shards[0].read_bytes()[entry.begin : entry.end]
    blocks = [raw[start : start + 4096] for start in range(0, len(raw), 4096)]
    assert len(set(blocks)) == len(blocks)


def test_weights_do_not_depend_on_the_shards(tmp_path: Path) -> None:
    """The same model in one file or in many has the same weights."""
    tensors = []
    for shard_bytes in (10**9, 30_000):
        found = prepare_checkpoint(replace(TINY, shard_bytes=shard_bytes), tmp_path)
        files = [shard.read_bytes() for shard in found.shards]
        tensors.append({tensor.name: files[tensor.shard][tensor.begin : tensor.end] for tensor in found.tensors})
    assert tensors[0] == tensors[1]


def test_seeds_differ(tmp_path: Path) -> None:
    """Another seed is another checkpoint, kept beside the first."""
    first, second = (prepare_checkpoint(replace(TINY, seed=seed), tmp_path) for seed in (0, 1))
    assert first.folder != second.folder
    assert first.fingerprint != second.fingerprint
    with pytest.raises(ConfigError, match="seed=-1"):
        prepare_checkpoint(replace(TINY, seed=-1), tmp_path)


def test_values_are_finite_and_tame(tmp_path: Path) -> None:
    """No NaN or infinity, nothing that float16 cannot hold: a forward pass proves something."""
    found = prepare_checkpoint(SyntheticModel(name="s", architecture=QWEN3_MOE), tmp_path)
    content = found.shards[0].read_bytes()
    for tensor in found.tensors:
        bits = np.frombuffer(content[tensor.begin : tensor.end], "<u2").astype(np.uint32) << 16
        values = np.abs(bits.view(np.float32))
        low, high = (1, 2) if "norm" in tensor.name else (2**-11, 2**-7)
        assert low <= values.min() and values.max() < high
        assert np.array_equal(values, values.astype(np.float16))


def test_it_is_made_once(tmp_path: Path) -> None:
    """The second run starts at once; `locate` finds it and makes nothing."""
    assert locate_checkpoint(TINY, tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()
    found = prepare_checkpoint(TINY, tmp_path / "cache")
    written = found.shards[0].stat().st_mtime_ns
    assert prepare_checkpoint(TINY, tmp_path / "cache").shards[0].stat().st_mtime_ns == written
    assert locate_checkpoint(TINY, tmp_path / "cache") == found.folder


@pytest.mark.parametrize("damage", ["truncated", "missing", "identity", "no identity", "list"])
def test_a_damaged_one_is_made_anew(tmp_path: Path, damage: str) -> None:
    """Whoever deleted or truncated a file in the cache gets it back."""
    found = prepare_checkpoint(TINY, tmp_path)
    identity = found.folder / "ladezeit.json"
    if damage == "truncated":
        os.truncate(found.shards[0], 100)
    elif damage == "missing":
        (found.folder / "config.json").unlink()
    elif damage == "no identity":
        identity.unlink()
    elif damage == "list":
        identity.write_text("[]")
    else:
        identity.write_text(json.dumps({**json.loads(identity.read_text()), "schema": 0}))
    assert locate_checkpoint(TINY, tmp_path) is None
    assert prepare_checkpoint(TINY, tmp_path) == found
    assert visible(tmp_path) == [found.folder.name]


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    """The bar ends at its end."""
    told: list[tuple[int, int]] = []
    found = prepare_checkpoint(TINY, tmp_path, lambda what, done, total: told.append((done, total)))
    assert told[-1] == (found.weight_bytes, found.weight_bytes)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    """The message has the bytes needed, the bytes free, and the way out."""
    huge = SyntheticModel(name="huge", architecture={**LARGE, "vocab_size": 10**9, "hidden_size": 2**20})
    with pytest.raises(CheckpointError, match=r"needs \d{16} bytes .* LADEZEIT_CACHE"):
        prepare_checkpoint(huge, tmp_path)
    assert visible(tmp_path) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    """Half a checkpoint is never found later; here the limit on file size stands for the full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))"
    done = python(limit + MAKE, tmp_path)
    assert "CheckpointError" in done.stderr and "LADEZEIT_CACHE" in done.stderr
    assert visible(tmp_path) == []


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """Interrupted while it writes, it takes away what it wrote."""
    process = started(MAKE, tmp_path)
    wait_for(lambda: list(tmp_path.glob(".*.partial/*.safetensors")))
    assert "KeyboardInterrupt" in interrupt(process, signal.SIGINT)
    assert visible(tmp_path) == []


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    """Killed hard it cannot clean up; whoever makes any checkpoint next does so."""
    process = started(MAKE, tmp_path)
    wait_for(lambda: list(tmp_path.glob(".*.partial/*.safetensors")))
    interrupt(process, signal.SIGKILL)
    assert visible(tmp_path) != []
    assert visible(tmp_path) == [name for name in visible(tmp_path) if name.endswith(".partial")]
    found = prepare_checkpoint(TINY, tmp_path)
    assert visible(tmp_path) == [found.folder.name]


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    """The second says that it waits, and gets what the first made; a third does not take that for a leftover."""
    first = started(MAKE, tmp_path)
    wait_for(lambda: list(tmp_path.glob(".*.partial/*.safetensors")))
    second = started(MAKE, tmp_path)
    prepare_checkpoint(TINY, tmp_path)
    said = [process.communicate(timeout=120)[0].splitlines() for process in (first, second)]
    assert said[0][0].startswith("writing") and said[1][0].startswith("waiting")
    assert len(said[1]) == 2  # it wrote nothing itself
    assert said[0][-1] == said[1][-1]
    assert len(visible(tmp_path)) == 2


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The way out is in the message; a checkpoint that is there already needs no writing."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="LADEZEIT_CACHE"):
        prepare_checkpoint(TINY, tmp_path / "file")


def test_odd_names_stay_in_the_cache(tmp_path: Path) -> None:
    """A model's name is for people; it cannot lead out of the cache folder."""
    for name in ("../../x", "a/b", "..", "ä ö", "x" * 500):
        folder = prepare_checkpoint(replace(TINY, name=name), tmp_path / "cache").folder
        assert folder.parent == tmp_path / "cache"
        assert inspect_checkpoint(folder, name)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
