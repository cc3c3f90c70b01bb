"""The migration guide and the before/after example do what they say."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from known_models import Known, says

from ladezeit.report.server_flags import SGLANG, VLLM, as_text, export_flags

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python (before|after)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def here(known: dict[str, Known], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the guide's code uses: a folder, the path of settings, a model's name in them."""
    monkeypatch.chdir(tmp_path)
    loading = {"device_map": "cpu", "torch_dtype": "bfloat16", "disable_cpu_offload": True}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"ape": {"path": str(known["ape"].folder), "loading": loading}}))
    return {"folder": str(known["ape"].folder), "settings_path": str(path), "name": "ape"}


@pytest.mark.slow
def test_the_guide_s_code_runs_and_both_sides_give_the_same_model(
    here: dict[str, Any], known: dict[str, Known], tmp_path: Path
) -> None:
    """Whoever replaces the code before by the code after gets the model that it had."""
    assert [side for side, _ in BLOCKS] == ["before", "after", "before", "after", "after"]
    spoken = []
    for side, code in BLOCKS:
        exec(compile(code, f"migrating.md ({side})", "exec"), here)
        spoken.append(says(here["model"]))
    assert set(spoken) == {known["ape"].tokens}
    assert here["seconds"]["ape"] > 0
    assert len(list(tmp_path.glob("outputs/production/*/result.json"))) == 1


def test_the_guide_s_settings_are_read() -> None:
    from ladezeit import ModelManager

    (document,) = re.findall(r"^```json\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    assert ModelManager(json.loads(document)).names == ["qwen-2.5-7b-instruct"]


@pytest.mark.slow
def test_before_and_after_load_the_same_and_show_their_phases(known: dict[str, Known]) -> None:
    """The example's output names the phases that only the hand-written flow has."""
    script = ROOT / "examples" / "origin_before_after.py"
    done = subprocess.run(
        [sys.executable, str(script), str(known["bee"].folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if re.match(r"load|in all", line)}
    assert rows["load/module_walk"][1] == rows["load/settings"][1] == "–"
    assert float(rows["load/module_walk"][0]) > 0
    assert "every key matched" in done.stdout


@pytest.mark.parametrize(
    ("loading", "vllm", "sglang"),
    [
        ({"engine": "fastsafetensors"}, "--load-format fastsafetensors", "--load-format fastsafetensors"),
        (
            {"engine": "runai_streamer", "threads": 16},
            "--load-format runai_streamer --model-loader-extra-config '{\"concurrency\": 16}'",
            "--load-format runai_streamer",
        ),
        ({"engine": "instanttensor"}, "--load-format instanttensor", None),
        (
            {"engine": "transformers", "disable_mmap": True},
            "--safetensors-load-strategy eager",
            "--weight-loader-disable-mmap",
        ),
        ({"engine": "transformers", "device_map": {"model": 0}}, None, None),
        ({"engine": "streamed"}, None, None),
        ({"engine": "mine:Engine"}, None, None),
    ],
)
def test_a_method_is_handed_over_in_a_server_s_own_words(
    loading: dict[str, Any], vllm: str | None, sglang: str | None
) -> None:
    """What a server has no flag for is said, not approximated."""
    entry = {"model": "my model", "method": "mine", "dtype": "float16", "loading": loading}
    handed = {each.server: each for each in export_flags(entry, "org/name")}
    for server, wanted in ((VLLM, vllm), (SGLANG, sglang)):
        command = handed[server].command
        assert (wanted is None) == (command is None)
        assert wanted is None or wanted in str(command)
        assert command is None or ("org/name" in command and "--dtype float16" in command)
    assert ("has no such flag" in as_text(list(handed.values()))) == (sglang is None)


def test_the_guide_s_command_reads_a_profile(tmp_path: Path) -> None:
    entry = {"method": "fast", "dtype": "bfloat16", "loading": {"engine": "fastsafetensors"}}
    (tmp_path / "profile.yaml").write_text(json.dumps({"schema_version": 1, "models": {"qwen": [entry]}}))
    (line,) = re.findall(r"^\$ ladezeit-results (hand-over .*)$", GUIDE, re.MULTILINE)
    script = Path(sys.executable).with_name("ladezeit-results")
    done = subprocess.run([str(script), *line.split()], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vllm serve Qwen/Qwen2.5-7B-Instruct --load-format fastsafetensors --dtype bfloat16" in done.stdout


def test_the_guide_s_flags_are_those_of_the_code() -> None:
    """The table and the command say the same."""
    rows = re.findall(r"^\| `(\w+)`.*? \| `(--[^`]+)`", GUIDE, re.MULTILINE)
    assert len(rows) >= 6
    for method, flags in rows:
        engine = {"transformers_no_mmap": "safetensors_pread"}.get(method, method)
        assert flags in str(export_flags({"loading": {"engine": engine}}, "m")[0].command)
