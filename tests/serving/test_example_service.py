"""The example service, started as its README says and asked over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from known_models import NEW_TOKENS, PROMPT, Known

SERVICE = Path(__file__).parents[2] / "examples" / "service"
pytestmark = pytest.mark.slow
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")


@pytest.fixture(scope="module")
def service(known: dict[str, Known], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[int]]]:
    """The address of the service with room for one model, and the answers of `/ready` until it was ready."""
    folder = tmp_path_factory.mktemp("service")
    loading = {"device_map": "cpu", "torch_dtype": "bfloat16", "disable_cpu_offload": True}
    config = {name: {"path": str(known[name].folder), "loading": loading} for name in ("ape", "bee")}
    (folder / "models.json").write_text(json.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "LADEZEIT_MODELS": str(folder / "models.json"),
        "LADEZEIT_HOST_BUDGET": str(known["ape"].bytes + 2**20),
        "LADEZEIT_AT_START": "ape",
    }
    command = [sys.executable, "-m", "uvicorn", "--factory", "service:from_environment", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=SERVICE, env={**os.environ, **environment}, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        yield address, until_ready(address, process, folder / "log")
    finally:
        process.terminate()
        process.wait(timeout=30)


def until_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> list[int]:
    seen: list[int] = []
    for _ in range(1200):
        try:
            seen.append(requests.get(f"{address}/ready", timeout=5).status_code)
        except requests.ConnectionError:
            assert process.poll() is None, log.read_text()
        if seen and seen[-1] == 200:
            return seen
        time.sleep(0.1)
    raise AssertionError(f"never ready: {seen[-3:]}\n{log.read_text()}")


def generate(address: str, name: str) -> requests.Response:
    question = {"model": name, "token_ids": list(PROMPT), "new_tokens": NEW_TOKENS}
    return requests.post(f"{address}/generate", json=question, timeout=120)


def metrics(address: str) -> dict[str, float]:
    lines = requests.get(f"{address}/metrics", timeout=10).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def test_it_is_ready_only_after_the_proof(service: tuple[str, list[int]]) -> None:
    """A load balancer sends nothing before that."""
    address, seen = service
    assert seen[0] == 503
    assert seen[-1] == 200
    assert metrics(address)['ladezeit_verification_seconds_count{model="ape"}'] >= 1


def test_two_models_take_turns_in_the_room_of_one(service: tuple[str, list[int]], known: dict[str, Known]) -> None:
    """Each answer is that model's, and the metrics say what it took."""
    address, _ = service
    for name in ("ape", "bee", "ape"):
        answered = generate(address, name)
        assert answered.status_code == 200, answered.text
        assert tuple(answered.json()["token_ids"]) == known[name].tokens
    found = metrics(address)
    assert found['ladezeit_loads_total{model="bee",outcome="ok"}'] >= 1
    assert found['ladezeit_unloads_total{model="bee",why="evicted"}'] >= 1
    assert 0 < found['ladezeit_weights_bytes{place="host"}'] <= known["ape"].bytes + 2**20
    models = requests.get(f"{address}/status", timeout=10).json()["models"]
    assert models["ape"]["state"] == "loaded"
    assert models["bee"]["state"] == "not loaded"


def test_requests_side_by_side_are_all_answered(service: tuple[str, list[int]], known: dict[str, Known]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    address, _ = service
    names = ["ape", "bee"] * 6
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda name: generate(address, name), names))
    assert [answer.status_code for answer in answers] == [200] * 12
    assert [tuple(answer.json()["token_ids"]) for answer in answers] == [known[name].tokens for name in names]


@pytest.mark.parametrize(
    ("question", "status", "said"),
    [
        ({"model": "aqe", "token_ids": [1]}, 404, "Did you mean 'ape'"),
        ({"model": "ape"}, 422, "give a prompt"),
        ({"model": "ape", "token_ids": [1], "new_tokens": 0}, 422, "new_tokens"),
    ],
)
def test_a_wrong_question_is_told_so(
    service: tuple[str, list[int]], question: dict[str, Any], status: int, said: str
) -> None:
    answered = requests.post(f"{service[0]}/generate", json=question, timeout=30)
    assert answered.status_code == status
    assert said in answered.text


def test_the_readme_s_models_are_read(origin_config: Callable[..., Any]) -> None:
    from ladezeit import ModelManager

    assert ModelManager(SERVICE / "models.json").names == ["tiny", "smollm2-135m"]
