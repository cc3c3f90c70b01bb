"""Secrets in addresses: ten are planted wherever a person may put one, and none is found in what is written."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from real_parts import mlflow_server

from ladezeit.config.compose import refuse_credentials
from ladezeit.errors import ConfigError

QUICK = ["model=tiny", "device=cpu", "inference=none", "validation=none", "ceilings=false", "discard_first=false"]
CANARIES = [f"canary{number:02}x7q" for number in range(10)]


class Nest:
    """A folder in which commands run; keeps what they say."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        own = {"LADEZEIT_CACHE": str(folder / "cache"), "COLUMNS": "200", **variables}
        self.variables = {**os.environ, **own}
        self.said = ""

    def run(self, script: str, *words: str, **variables: str) -> int:
        """Run one of the console scripts and return its exit code."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name(script)), *words],
            cwd=self.folder,
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        self.said += done.stdout + done.stderr
        return done.returncode

    def found(self) -> list[str]:
        """Return where a canary was found: in what was said, in a file, or in the name of one."""
        places = [f"said: {line}" for line in self.said.splitlines() if any(canary in line for canary in CANARIES)]
        for path in self.folder.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            places += [str(path) for canary in CANARIES if canary.encode() in content or canary in str(path)]
        return places


def option(folder: Path, uri: str) -> str:
    """Write an option of a person's own, and return the flag that makes it known."""
    (folder / "tracking").mkdir(parents=True)
    (folder / "tracking" / "own.yaml").write_text(f"kind: server\nuri: {uri}\nexperiment: ladezeit\n")
    return f"--config-dir={folder}"


@pytest.mark.slow
def test_ten_planted_secrets_are_found_nowhere(tmp_path: Path, with_store: Callable[[Path], Path]) -> None:
    """What is measured is copied, published and shown to a team: nobody thinks of the password in an address then."""
    user, password, token, query, title, of_file, of_sweep, hub, of_variable, of_option = CANARIES
    nest = Nest(tmp_path / "nest", HF_ENDPOINT=f"https://me:{hub}@mirror/x", MLFLOW_TRACKING_PASSWORD=of_variable)
    nest.folder.mkdir()
    single = option(tmp_path / "single", f"postgresql://me:{of_file}@db/runs")
    sweep = option(tmp_path / "sweep", f"http://db/?sslpassword={of_sweep}")
    refused = [
        [f"tracking.uri=postgresql://{user}:{password}@db/runs"],
        [f"tracking.uri=http://{token}@host:5000", "sample=range(2)", "-m"],
        [f"+tracking.url=http://host/?api_key={query}"],
        [f"title=http://me:{title}@host", f"no override at http://me:{title}@host"],
        ["tracking=own", single],
        ["tracking=own", "sample=range(2)", "-m", sweep],
    ]
    for words in refused:
        assert nest.run("ladezeit", *QUICK, *words) == 2, nest.said
    assert nest.said.count("holds an address with a user, a password or a token") == len(refused), nest.said
    assert not list(nest.folder.rglob("*.yaml")), "what is refused is not written down"

    with mlflow_server(tmp_path, f"sqlite:///{with_store(nest.folder / 'served')}/mlflow.db") as (address, _):
        inside = address.replace("://", f"://{user}:{password}@")
        assert nest.run("ladezeit", *QUICK, "tracking=server", "sample=range(1)", "-m", MLFLOW_TRACKING_URI=inside) == 0
        assert nest.run("ladezeit", *QUICK, "tracking=server", MLFLOW_TRACKING_URI=inside) == 0, nest.said
        typed = address.replace("://", f"://me:{of_option}@")
        for command in (["sync"], ["reap"], ["compare", "--experiment", "ladezeit"], ["show", "--experiment", "no"]):
            assert nest.run("ladezeit-results", *command, "--tracking-uri", typed) in (0, 2)
        nest.run("ladezeit-results", "check", "--baseline", typed, "--max-slowdown", "5%")
    assert nest.run("ladezeit", *QUICK, "tracking=server", MLFLOW_TRACKING_URI=inside) == 2
    assert "nothing answers at" in nest.said and "0 written, 1 known" in nest.said
    (nest.folder / "server.log").write_bytes((tmp_path / "server.log").read_bytes())
    locks = [path.read_text() for path in (nest.folder / "cache" / "locks").iterdir()]
    assert locks and len(list(nest.folder.rglob("config.yaml"))) >= 2, "there is something to look through"
    assert nest.found() == []


def test_a_refusal_names_the_key_and_not_the_secret() -> None:
    """Who is refused has to know what to change, on a screen that others may see."""
    with pytest.raises(ConfigError, match=r"^model\.path holds an address with a user.*MLFLOW_TRACKING_URI") as raised:
        refuse_credentials({"model": {"name": "x", "path": ["/a", "https://me:geh3im@host"]}})
    assert "geh3im" not in str(raised.value)
    refuse_credentials({"title": "cold, 7B @ 4 threads", "model": {"path": "file:///a@b", "seed": 0}})
