"""The GPU machine's part: all GPU tests, then the origin case on the 7B shape. No network, within eight minutes.

    python benchmarks/gpu.py [--output FOLDER] [--model qwen2.5-7b-shape] [--samples 3] [--budget-s 470] [--device cuda]

It runs from a bare checkout: nothing has to be installed but the libraries (torch, transformers, accelerate,
safetensors, hydra-core, rich, psutil, nvidia-ml-py, matplotlib, pytest; MLflow where it is there, and what else a
test imports: a file of tests whose library is missing is an error of that file alone). The package is laid out in a
temporary folder, where its `conf/` is `ladezeit.conf` as in an install. The 15 GB checkpoint is written by the first
sweep that needs it, into LADEZEIT_CACHE.

What comes back, all small: `gpu.json` (machine, steps, seconds, exit codes), `tests.txt`, `proof.json`, and for each
sweep its `<name>.md` (the table), `<name>.html` (the report) and `<name>.jsonl` (every result). A step that no longer
fits the budget is left out, and `gpu.json` says so. The last line of output is `gpu.json`'s content.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: The most that tests may take of the budget.
TESTS_SHARE = 0.4
#: The sweep whose checkpoint lies in memory.
TMPFS = "tmpfs"
MEMORY = Path("/dev/shm")
NEEDED = ("torch", "transformers", "accelerate", "safetensors", "hydra", "omegaconf", "rich", "psutil", "pynvml")


@dataclass
class Step:
    """One command: what it took and how it ended; `exit_code` None means that there was no time left for it."""

    name: str
    command: list[str]
    seconds: float = 0.0
    exit_code: int | None = None
    note: str = ""


@dataclass
class Report:
    """Everything that `gpu.json` says."""

    machine: str
    steps: list[Step] = field(default_factory=list)


class Runner:
    """Runs steps one after another until the budget is spent."""

    def __init__(self, site: Path, output: Path, budget_s: float) -> None:
        self.output = output
        self.deadline = time.monotonic() + budget_s
        path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
        self.environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}

    def run(self, step: Step, log: Path | None = None, most_s: float = float("inf"), cache: Path | None = None) -> Step:
        """Run one step in what is left of the budget, for `most_s` seconds at most, and note how it ended.

        `cache` is the folder for checkpoints, where that is not LADEZEIT_CACHE.
        """
        left_s = min(most_s, self.deadline - time.monotonic())
        if left_s < 20:
            step.note = "left out: no time left"
            return step
        started = time.monotonic()
        print(f"== {step.name}: {' '.join(step.command)}", flush=True)
        try:
            done = subprocess.run(
                [sys.executable, *step.command],
                cwd=ROOT,
                env=self.environment | ({"LADEZEIT_CACHE": str(cache)} if cache else {}),
                timeout=left_s,
                check=False,
                text=True,
                stdout=subprocess.PIPE if log else None,
                stderr=subprocess.STDOUT if log else None,
            )
            step.exit_code = done.returncode
            if log:
                log.write_text(done.stdout)
                print("\n".join(done.stdout.splitlines()[-15:]))
        except subprocess.TimeoutExpired as late:
            step.note = "ended by the budget"
            step.exit_code = 124
            if log and late.stdout:
                log.write_bytes(late.stdout if isinstance(late.stdout, bytes) else late.stdout.encode())
        step.seconds = round(time.monotonic() - started, 1)
        return step

    def sweep(self, name: str, outputs: Path, *overrides: str) -> Step:
        """Run a sweep and keep its table and all its results, also of one that the budget ended.

        That called `TMPFS` has its checkpoint in memory, in a file system without a disk, and removes it again.
        """
        command = [
            "-m",
            "ladezeit",
            "--multirun",
            *overrides,
            f"hydra.sweep.dir={outputs / name}",
            f"outputs={outputs}",
        ]
        step = Step(name, command)
        if name != TMPFS:
            self.run(step)
        elif MEMORY.is_dir():
            with tempfile.TemporaryDirectory(prefix="ladezeit-", dir=MEMORY) as memory:
                self.run(step, cache=Path(memory))
        else:
            step.note = f"left out: this machine has no {MEMORY}"
        keep(outputs / name, self.output / name)
        return step


def keep(sweep: Path, target: Path) -> None:
    """Copy a sweep's summary and report, and gather its results in one file, a line each."""
    for kept in (sweep / "summary.md", sweep / "report" / "report.html"):
        if kept.exists():
            shutil.copy(kept, target.with_suffix(kept.suffix))
    results = sorted(sweep.glob("*/result.json"), key=lambda path: path.parent.name.zfill(6))
    lines = [json.dumps(json.loads(path.read_text()), ensure_ascii=False) for path in results]
    if lines:
        target.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")


def lay_out(site: Path) -> None:
    """Make the checkout importable as an install would be, without installing anything."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "ladezeit", site / "ladezeit", ignore=ignored)
    shutil.copytree(ROOT / "conf", site / "ladezeit" / "conf", ignore=ignored)
    shutil.copytree(ROOT / "src" / "hydra_plugins", site / "hydra_plugins", ignore=ignored)


def check_libraries() -> None:
    """Stop with one clear message where a library is missing: there is no network to get it from."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"gpu.py needs {', '.join(missing)} importable by {sys.executable}; nothing was started")


def describe_machine() -> str:
    """Return the GPU as its own tool describes it, or that there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,pcie.link.gen.max", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no GPU: {error}"


def main() -> None:
    """Run all steps and leave the report; exit 1 where the tests or a whole sweep failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "gpu")
    parser.add_argument("--model", default="qwen2.5-7b-shape")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=470)
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself where there is no GPU")
    arguments = parser.parse_args()
    check_libraries()
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = Report(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        site, outputs = Path(folder) / "site", Path(folder) / "outputs"
        lay_out(site)
        runner = Runner(site, arguments.output, arguments.budget_s)
        tests = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        step = Step("tests", [*tests, *files_with_gpu_tests()])
        report.steps.append(runner.run(step, arguments.output / "tests.txt", arguments.budget_s * TESTS_SHARE))
        tracking = "sqlite" if importlib.util.find_spec("mlflow") else "none"
        base = [f"device={arguments.device}", f"model={arguments.model}", f"tracking={tracking}"]
        repeat = f"sample=range({arguments.samples})"
        for name, overrides in sweeps(repeat).items():
            report.steps.append(runner.sweep(name, outputs, *base, *overrides))
            if name == "engines":
                report.steps.append(runner.run(proof_step(arguments)))
    plain = asdict(report)
    (arguments.output / "gpu.json").write_text(json.dumps(plain, indent=2) + "\n")
    print(json.dumps(plain))
    # a sweep's exit code 1 says that some samples are not ok, as where an engine cannot run here: the results tell
    good = all(step.exit_code in ((0,) if step.name == "tests" else (0, 1)) for step in report.steps)
    sys.exit(0 if good else 1)


def files_with_gpu_tests() -> list[str]:
    """Return the files of tests that have any for a GPU: others may import what is not there."""
    files = (ROOT / "tests").rglob("test_*.py")
    return sorted(str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text())


def proof_step(arguments: argparse.Namespace) -> Step:
    """Return what measures the proof of contents beside one pass over the GPU's memory."""
    given = ["--model", arguments.model, "--device", arguments.device, "--samples", "5"]
    return Step("proof", ["benchmarks/proof.py", *given, "--output", str(arguments.output / "proof.json")])


def sweeps(repeat: str) -> dict[str, list[str]]:
    """Return the sweeps by name, the most important first: the budget may end before the last one."""
    fresh = ["process=fresh", "loading=cuda_fp16,legacy_manager", "cache=warm", "sample=0,1", "runtime=origin"]
    cold = ["process=prewarmed", "loading=transformers", "cache=cold", repeat]
    ours = "transformers,streamed,auto"
    engines = f"{ours},safetensors_mmap,safetensors_prefetch,fastsafetensors,runai_streamer,instanttensor"
    return {
        "origin_case": ["experiment=origin_case", repeat],
        "engines": ["process=prewarmed", f"loading={engines}", "cache=warm,cold", repeat],
        TMPFS: ["process=prewarmed", f"loading={engines}", "cache=warm", repeat],
        "half": ["process=prewarmed", f"loading={ours},instanttensor", "cache=half", repeat],
        "cast": ["process=prewarmed", f"loading={ours}", "loading.dtype=float16", "cache=warm", repeat],
        "quantised": ["process=prewarmed", "loading=bitsandbytes_8bit,bitsandbytes_4bit,torchao_int8", "cache=warm"],
        "cold": cold,
        "validation_cost": ["experiment=validation_cost", repeat],
        "cold_start": fresh,
    }


if __name__ == "__main__":
    main()
