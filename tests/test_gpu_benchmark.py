"""`benchmarks/gpu.py` on a machine that may be taken away at any moment: what was measured comes back, proven."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hydra import compose, initialize_config_module

from ladezeit.config import ValidationLevel, build_config
from ladezeit.config.compose import read_option
from ladezeit.config.hydra_support import register_schemas
from ladezeit.loading.streamed.arguments import StreamedLoading
from ladezeit.loading.streamed.device import slot_bytes

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu_calls  # noqa: E402 (no package: programs of one folder)
import gpu_kept  # noqa: E402
import gpu_wheels  # noqa: E402

Run = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def run(tmp_path: Path, cache: Path) -> Run:
    """Start the program on the tiny model, everything that it writes below one folder."""

    def start(*arguments: str) -> "subprocess.Popen[bytes]":
        (tmp_path / "tmp").mkdir()
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--model", "tiny", "--samples", "1"]
        return subprocess.Popen(
            [*command, "--device", "cpu", "--output", str(tmp_path / "out"), *arguments],
            env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    return start


def report_in(folder: Path) -> dict[str, Any]:
    """Return the report, having compared every file that it names with the archive."""
    report: dict[str, Any] = json.loads((folder / gpu_kept.REPORT).read_text())
    inside = content_of(folder / gpu_kept.ARCHIVE)
    steps = json.loads(inside[gpu_kept.REPORT])["steps"]
    assert steps[: len(report["steps"])] == report["steps"], "the archive is renewed first"
    named = [name for step in report["steps"] for name in step["files"]]
    assert sorted(named) == sorted([*report["files"], *report["left_out_because_too_large"]])
    assert {name: hashlib.sha256(inside[name]).hexdigest() for name in report["files"]} == report["files"]
    return report


def content_of(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as packed:
        return {member.name: packed.extractfile(member).read() for member in packed}  # type: ignore[union-attr]


def wait_for(what: Callable[[], Any], process: "subprocess.Popen[bytes] | None" = None, limit_s: float = 180) -> None:
    end = time.monotonic() + limit_s
    while not what():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def running(folder: Path) -> str | None:
    file = folder / gpu_kept.REPORT
    return json.loads(file.read_text())["running"] if file.exists() else None


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes that work with anything below `folder`."""
    return [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or [])]


def has_a_load(file: Path) -> bool:
    return file.exists() and b'"status": "ok"' in file.read_bytes()


def proven_levels(lines: bytes) -> set[str]:
    """Return the levels that the loads among results were proven by; engines that need a GPU are skipped here."""
    results = [json.loads(line) for line in lines.splitlines()]
    loads = [result for result in results if result["status"] != "skipped"]
    assert loads and all(load["status"] == "ok" and load["proof"]["passed"] for load in loads)
    return {load["proof"]["level"] for load in loads}


def test_killed_at_its_first_step_it_leaves_a_whole_archive(run: Run, tmp_path: Path) -> None:
    """A machine that is taken away at once leaves two files that can be read."""
    process = run("--steps", "ring")
    wait_for(lambda: running(tmp_path / "out"), process)
    process.kill()
    process.wait()
    report = report_in(tmp_path / "out")
    assert report["running"] in ("checkpoint", "ring")
    assert "ring" not in [step["name"] for step in report["steps"]]
    wait_for(lambda: not processes_of(tmp_path))


@pytest.mark.slow
def test_killed_in_a_sweep_it_loses_nothing(run: Run, tmp_path: Path) -> None:
    """What was measured before is in the archive, the running sweep's results lie beside it, and nobody measures on."""
    process, out = run("--steps", "ring,half"), tmp_path / "out"
    wait_for(lambda: has_a_load(out / "half.jsonl"), process)
    process.kill()
    process.wait()
    report = report_in(out)
    assert [step["name"] for step in report["steps"]] == ["checkpoint", "ring"]
    assert report["steps"][1]["proven"] == {"content": len(gpu_calls.RINGS)} and not report["steps"][1]["failed"]
    assert report["running"] == "half"
    assert {"ring.md", "ring.html", "ring.jsonl", "ring.log"} <= report["files"].keys()
    assert proven_levels(content_of(out / gpu_kept.ARCHIVE)["ring.jsonl"]) == {"content"}
    assert proven_levels((out / "half.jsonl").read_bytes()) == {"content"}
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "gpu.tar.gz", "half.jsonl", "half.log"]
    wait_for(lambda: not processes_of(tmp_path))


@pytest.mark.slow
def test_interrupted_it_keeps_what_the_running_sweep_has(run: Run, tmp_path: Path) -> None:
    """Ctrl-C, or a polite end of the machine: the step says that it was ended, and its results are in the archive."""
    process, out = run("--steps", "ring,half"), tmp_path / "out"
    wait_for(lambda: has_a_load(out / "ring.jsonl"), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    report = report_in(out)
    assert [(step["name"], step["failed"]) for step in report["steps"]] == [("checkpoint", False), ("ring", True)]
    assert "SIGTERM" in report["steps"][1]["note"]
    assert proven_levels(content_of(out / gpu_kept.ARCHIVE)["ring.jsonl"]) == {"content"}
    assert not processes_of(tmp_path) and not list((tmp_path / "tmp").glob("ladezeit-*"))


def test_what_the_machine_lacks_is_left_out_with_the_reason(run: Run, tmp_path: Path) -> None:
    """A sweep of a package that is not there is no failure; the budget's end is told too."""
    process = run("--steps", "prefetch,cast", "--budget-s", "45")
    assert process.wait(120) == 0, process.communicate()[1]
    steps = {step["name"]: step for step in report_in(tmp_path / "out")["steps"]}
    assert re.search(r"safetensors>=0\.9\.0rc1 is wanted, \S+ is installed", steps["prefetch"]["note"])
    assert steps["cast"]["note"] == "left out: no time left"
    assert steps["prefetch"]["exit_code"] is steps["cast"]["exit_code"] is None


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_machine_that_is_not_fit_is_not_measured(run: Run, tmp_path: Path) -> None:
    """Where the smoke step fails, minutes on the machine are not spent on what cannot work."""
    process = run("--steps", "smoke,ring", "--device", "cuda")
    assert process.wait(180) == 1
    smoke, ring = report_in(tmp_path / "out")["steps"]
    assert smoke["failed"] and ring["note"] == "left out: the smoke step failed"
    said = json.loads(content_of(tmp_path / "out" / gpu_kept.ARCHIVE)["smoke.json"])
    assert said["failed"] == ["kernel", "host_to_device", "registering", "link", "loads"]
    assert said["system"]["folders"]["TMPDIR"]["filesystem"]


def test_every_sweep_proves_every_bit() -> None:
    """A slot of the ring that is filled too soon shows in values alone, which no other validation reads."""
    register_schemas()
    with initialize_config_module("ladezeit.conf", version_base="1.3"):
        for name, sweep in gpu_calls.SWEEPS.items():
            overrides = [override.partition(",")[0] for override in sweep.overrides.format(samples="").split()]
            overrides = [
                "loading=streamed" if override.startswith("loading=ring") else override for override in overrides
            ]
            config = build_config(compose("config", [*overrides, "outputs=/tmp/outputs", "hydra/sweeper=basic"]))
            assert (config.validation.level is ValidationLevel.content) == (name != "validation_cost"), name


def test_the_ring_is_measured_at_slots_that_it_really_has(tmp_path: Path) -> None:
    """Ring and extent together make a slot: none of the points is another's twin, or limited by something else."""
    folder = gpu_calls.ring_options(tmp_path)
    slots = {}
    for name in gpu_calls.RINGS:
        option = read_option("loading", name, folder)
        assert isinstance(option, StreamedLoading) and option.threads is not None
        slot_mib = slot_bytes(option.ring_bytes, option.threads, option.extent_bytes) // 2**20
        slots[option.threads, slot_mib, option.readers.value] = name
    assert set(slots) == set(gpu_calls.RINGS.values())


def test_the_calls_have_every_step_once_and_packages_that_can_be_had() -> None:
    """Three calls are everything; each package has a way to be had, in the version that ladezeit is tested with."""
    steps = [step for call in gpu_calls.CALLS.values() for step in call.steps if step != "smoke"]
    assert len(steps) == len(set(steps)) and {"smoke", *steps} == set(gpu_calls.STEPS)
    assert set(gpu_calls.SWEEPS) == set(steps) - {"tests", "tests_other", "proof"}
    surely = ("smoke", "tests", "proof", "warm")
    assert sum(gpu_calls.SHARES[name] for name in surely) < 0.9
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for call in gpu_calls.CALLS.values():
        for package in call.packages:
            assert package in gpu_calls.PACKAGES
            assert "==" in package or package in pinned


def test_each_file_of_gpu_tests_is_run_by_one_call() -> None:
    """None is forgotten when files move, and none is run twice."""
    first, other = gpu_calls.gpu_tests(first=True), gpu_calls.gpu_tests(first=False)
    for beginning in gpu_calls.FIRST_TESTS:
        assert any(name.startswith(beginning) for name in first), beginning
    for beginning in gpu_calls.LAST_TESTS:
        assert any(name.startswith(beginning) for name in other), beginning
    assert not set(first) & set(other)
    marked = {file for file in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in file.read_text()}
    assert {str(file.relative_to(ROOT)) for file in marked} <= {*first, *other}


def test_an_archive_that_would_be_too_large_says_what_is_not_in_it(tmp_path: Path) -> None:
    """Results come back before pictures that can be made of them again."""
    kept = gpu_kept.Kept(tmp_path / "out", tmp_path / "work", {"machine": "this"}, most_bytes=60_000)
    noise = random.Random(0)
    for name, size in {"warm.html": 50_000, "warm.jsonl": 30_000, "warm.log": 25_000}.items():
        (tmp_path / "work" / name).write_bytes(noise.randbytes(size))
    kept.end(gpu_kept.Step("warm"))
    report = report_in(tmp_path / "out")
    assert report["left_out_because_too_large"] == ["warm.html"]
    assert set(report["files"]) == {"warm.jsonl", "warm.log"}
    assert (tmp_path / "out" / gpu_kept.ARCHIVE).stat().st_size <= 60_000
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        gpu_kept.Kept(tmp_path / "out", tmp_path / "work", {})


@pytest.mark.parametrize(
    ("statuses", "exit_code", "failed"),
    [
        (["ok", "skipped", "failed"], 1, False),
        (["skipped", "skipped"], 3, False),
        (["failed", "skipped"], 3, True),
        (["ok", "wrong"], 1, True),
        ([], 2, True),
    ],
)
def test_a_sweep_fails_where_nothing_could_be_measured_or_a_sample_is_wrong(
    statuses: list[str], exit_code: int, failed: bool
) -> None:
    """What cannot run on a machine is no failure of it; weights that are not the checkpoint's are."""
    step = gpu_kept.Step("warm", exit_code=exit_code)
    step.judge([{"status": status, "proof": None, "reason": "needs another machine"} for status in statuses])
    assert step.failed == failed
    if set(statuses) == {"skipped"}:
        assert step.note == "nothing of it can run here: needs another machine"


def test_a_wheel_is_whole_without_the_files_that_are_left_out(tmp_path: Path) -> None:
    """Of a package's libraries for all releases of CUDA one travels, and pip installs the wheel as any other."""
    wheel = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    libraries = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda118", "cuda130", "rocm72")]
    info = "bitsandbytes-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as made:
        for name in ("bitsandbytes/__init__.py", *libraries):
            made.writestr(name, name)
        made.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 1.0\n")
        made.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr(f"{info}/RECORD", "")
    gpu_wheels.leave_out(wheel, re.compile(gpu_calls.LEFT_OUT["bitsandbytes"]))
    target = gpu_wheels.install(tmp_path, tmp_path / "site")
    installed = {path.name for path in (target / "bitsandbytes").iterdir()}
    assert installed == {"__init__.py", "libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"}
    assert "libbitsandbytes_cuda130.so,sha256=" in (target / info / "RECORD").read_text()
