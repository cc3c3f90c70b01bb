"""Models of the hub: cached ones need no network, others are fetched without waste, each failure says what to do."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_hub
import pytest
from fake_hub import COMMIT, Hub

from checkpoint_files import python, sharded, single, write_shard

#: Prepares the model; prints its folder and file names, or the error.
PREPARE = """
import json, os, sys
from pathlib import Path
from ladezeit.checkpoint.resolve import locate_checkpoint, prepare_checkpoint
from ladezeit.config import HubModel
from ladezeit.errors import CheckpointError
repo_id, revision = sys.argv[1:]
model = HubModel(name="mine", repo_id=repo_id, revision=revision)
told = []
try:
    before = locate_checkpoint(model, Path("/nowhere"))
    found = prepare_checkpoint(model, Path("/nowhere"), lambda *arguments: told.append(arguments))
    print(json.dumps({
        "before": before and str(before), "folder": str(found.folder), "told": told[-1:],
        "files": sorted(os.listdir(found.folder)), "bytes": found.weight_bytes, "format": found.file_format,
    }))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    repository = sharded(tmp_path / "repository")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "README.md", "model.py"):
        (repository / name).write_text(json.dumps({"is": name}))
    (repository / "original").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/params.json", "tf_model.h5"):
        (repository / name).write_bytes(b"not wanted")
    with fake_hub.running(repository) as server:
        yield server


def ask(home: Path, endpoint: str, repo_id: str = "fake/model", revision: str = COMMIT, **environment: str) -> Any:
    done = python(
        PREPARE,
        repo_id,
        revision,
        HF_HOME=str(home),
        HF_ENDPOINT=endpoint,
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_XET="1",
        HF_HUB_ETAG_TIMEOUT="5",
        **environment,
    )
    return answer_of(done)


def answer_of(done: "subprocess.CompletedProcess[str]") -> Any:
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_needed_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    """Weights of the index, configs, tokenizer, template; no pickles, no second copies. Afterwards no request."""
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    wanted |= {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    first = ask(tmp_path / "home", hub.url)
    assert first["before"] is None
    assert set(first["files"]) == set(hub.downloads) == wanted
    assert len(hub.downloads) == len(wanted)
    assert (first["bytes"], first["format"]) == (28, "safetensors")
    assert first["told"][0][0] == "downloading fake/model"
    assert first["told"][0][1] == first["told"][0][2] > 28
    requests = hub.requests
    second = ask(tmp_path / "home", hub.url)
    assert second["before"] == second["folder"] == first["folder"]
    assert second["told"] == []
    assert hub.requests == requests


def test_an_interrupted_download_is_completed(hub: Hub, tmp_path: Path) -> None:
    """A snapshot with a missing shard is not taken for a whole one; only what is missing is fetched."""
    folder = Path(ask(tmp_path / "home", hub.url)["folder"])
    hub.downloads.clear()
    shard = folder / "model-00002-of-00002.safetensors"
    shard.resolve().unlink()
    shard.unlink()
    again = ask(tmp_path / "home", hub.url)
    assert again["before"] is None
    assert hub.downloads == [shard.name]
    assert "error" not in again


def test_a_branch_is_found_in_the_cache_again(hub: Hub, tmp_path: Path) -> None:
    """A revision may be a branch; the cached commit of it is used, offline too."""
    first = ask(tmp_path / "home", hub.url, revision="main")
    assert first["folder"].endswith(COMMIT)
    assert (
        ask(tmp_path / "home", "http://127.0.0.1:1", revision="main", HF_HUB_OFFLINE="1")["before"] == first["folder"]
    )


def test_pickles_are_fetched_only_where_there_is_nothing_else(hub: Hub, tmp_path: Path) -> None:
    """A repository of .bin files alone is fetched, and then checked for safety."""
    for path in hub.files():
        if path.name.endswith((".safetensors", ".index.json")):
            path.unlink()
    answer = ask(tmp_path / "home", hub.url)
    assert "pytorch_model.bin" in hub.downloads
    assert "no file of torch.save" in answer["error"]


def test_a_single_file_is_fetched_alone(hub: Hub, tmp_path: Path) -> None:
    """Where model.safetensors is there, it is the one that is loaded, whatever lies beside it."""
    single(hub.repository)
    write_shard(hub.repository / "model.fp16.safetensors", a=100)
    ask(tmp_path / "home", hub.url)
    assert [name for name in hub.downloads if name.endswith("safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("repo_id", "revision", "messages"),
    [
        ("fake/none", COMMIT, ["fake/none is not on the hub, or private", "hf auth login"]),
        ("fake/gated", COMMIT, ["fake/gated is gated. Accept its terms at http://127.0.0.1", "hf auth login"]),
        ("fake/model", "gone", ["fake/model has no revision 'gone'"]),
        ("fake/broken", COMMIT, ["could not be fetched from http://127.0.0.1", "500"]),
        ("a/b/c", COMMIT, ["model.repo_id=a/b/c is no name on the hub"]),
    ],
)
def test_each_refusal_says_what_to_do(
    hub: Hub, tmp_path: Path, repo_id: str, revision: str, messages: list[str]
) -> None:
    """One message, no stack of HTTP errors."""
    error = ask(tmp_path / "home", hub.url, repo_id, revision)["error"]
    for message in messages:
        assert message in error


def test_a_repository_without_weights_is_named(hub: Hub, tmp_path: Path) -> None:
    """An adapter or a GGUF repository is refused before anything large is fetched."""
    for path in hub.files():
        if path.name.endswith((".safetensors", ".index.json", ".bin")):
            path.unlink()
    assert "has no weights that from_pretrained loads" in ask(tmp_path / "home", hub.url)["error"]
    assert hub.downloads == []


def test_no_connection_and_offline_mode_are_told_apart(tmp_path: Path) -> None:
    """Without a network the way out is a local folder; in offline mode it is the switch."""
    closed = "http://127.0.0.1:1"
    assert "Check the connection" in ask(tmp_path, closed)["error"]
    offline = ask(tmp_path, closed, HF_HUB_OFFLINE="1")["error"]
    assert "HF_HUB_OFFLINE forbids to fetch it" in offline
