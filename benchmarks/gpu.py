"""The GPU machine's part: all GPU tests, the engines, the proof and the origin case on the 7B shape. No network needed.

    python benchmarks/gpu.py [--output FOLDER] [--model qwen2.5-7b-shape] [--samples 3] [--budget-s 470] [--device cuda]
                             [--steps tests,proof,warm,cold,tmpfs,...]

It runs from a bare checkout: nothing has to be installed but the libraries (torch, transformers, accelerate,
safetensors, hydra-core, rich, psutil, nvidia-ml-py, matplotlib, pytest; MLflow where it is there, and what else a
test imports: a file of tests whose library is missing is an error of that file alone). The package is laid out in a
temporary folder, where its `conf/` is `ladezeit.conf` as in an install. The 15 GB checkpoint is written by the first
step that needs it, into LADEZEIT_CACHE.

The steps run in the order of `STEPS`, the most important first, until the budget is spent (eight minutes, unless told
otherwise). A sweep that the budget ends is interrupted as by Ctrl-C and keeps what it has; a step for which no time is
left is left out; `gpu.json` says both, and `--steps` runs the others another time. TMPDIR should be on a disk: tests of
the page cache want one.

What comes back, all small: `gpu.json` (machine, steps, seconds, exit codes), `tests.txt`, `proof.json`, for each sweep
its `<name>.md` (the table), `<name>.html` (the report) and `<name>.jsonl` (every result), and all of these in
`gpu.tar.gz`. The last line of output is `gpu.json`'s content.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEMORY = Path("/dev/shm")
NEEDED = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "hydra",
    "omegaconf",
    "antlr4",
    "rich",
    "psutil",
    "pynvml",
)

#: No step is begun with less than this.
_LEAST_S = 20
#: Files of tests that come first, because they say the most, and those that come last, because they take long.
_FIRST_TESTS = ("tests/validation/", "tests/loading/streamed/", "tests/measure/")
_LAST_TESTS = (
    "tests/faults/",
    "tests/serving/test_memory_given_back.py",
    "tests/serving/test_many_threads.py",
    "tests/test_ranks.py",
)
#: An interrupted sweep writes its table and its report within this.
_GRACE_S = 20
#: The most that tests may take of the budget.
_TESTS_SHARE = 0.4

_OURS = "transformers,streamed,auto"
_ENGINES = f"loading={_OURS},safetensors_mmap,safetensors_prefetch,fastsafetensors,runai_streamer,instanttensor"
_QUANTISED = "loading=bitsandbytes_8bit,bitsandbytes_4bit,torchao_int8"
#: Without the manager whose walk copies every weight of 15 GB six times: minutes.
_ORIGIN = (
    "transformers,cuda_fp16,device_map_auto,device_map_auto_max_memory,cpu_then_move,single_device_map,legacy_manager"
)
#: Whether more readers, or a larger ring that takes longer to pin, pay.
_RINGS = f"loading.threads=4,8,16 loading.ring_bytes={64 * 2**20},{256 * 2**20}"
#: The sweeps by name. `{samples}` of each point; the ceilings are measured where they say something new.
SWEEPS = {
    "warm": f"process=prewarmed cache=warm {_ENGINES} {{samples}}",
    "cold": f"process=prewarmed cache=cold {_ENGINES} {{samples}}",
    "tmpfs": f"process=prewarmed cache=warm {_ENGINES} {{samples}}",  # in memory, in a file system without a disk
    "ring": f"process=prewarmed cache=warm loading=streamed {_RINGS} ceilings=off {{samples}}",
    "origin_case": f"experiment=origin_case loading={_ORIGIN} ceilings=off {{samples}}",
    "half": f"process=prewarmed cache=half loading={_OURS},instanttensor {{samples}}",
    "cast": f"process=prewarmed cache=warm loading={_OURS} loading.dtype=float16 ceilings=off {{samples}}",
    "quantised": f"process=prewarmed cache=warm {_QUANTISED} ceilings=off",
    "validation_cost": "experiment=validation_cost ceilings=off {samples}",
    "cold_start": "process=fresh cache=warm loading=cuda_fp16,legacy_manager runtime=origin ceilings=off sample=0,1",
}
#: All steps, the most important first: the budget may end before the last one.
STEPS = ("tests", "proof", *SWEEPS)


@dataclass
class Step:
    """One command: what it took and how it ended; `exit_code` None means that it was left out, and `note` says why."""

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

    def __init__(self, site: Path, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.outputs = site.parent / "outputs"
        self.deadline = time.monotonic() + arguments.budget_s
        path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
        self.environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self.environment |= cuda_runtime(site.parent / "runtime")

    def step(self, name: str) -> Step:
        """Run the step of that name, one of `STEPS`."""
        if name == "tests":
            return self._tests()
        return self._proof() if name == "proof" else self._sweep(name)

    def _tests(self) -> Step:
        options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        step = Step("tests", ["-m", "pytest", *options, *files_with_gpu_tests()])
        log = self.arguments.output / "tests.txt"
        with log.open("w") as file:
            self._run(step, most_s=self.arguments.budget_s * _TESTS_SHARE, stdout=file.fileno())
        print("\n".join(log.read_text().splitlines()[-15:]), flush=True)
        return step

    def _proof(self) -> Step:
        """Measure the proof of contents beside one pass over the device's memory."""
        given = ["--model", self.arguments.model, "--device", self.arguments.device, "--samples", "5"]
        output = self.arguments.output / "proof.json"
        return self._run(Step("proof", ["benchmarks/proof.py", *given, "--output", str(output)]))

    def _sweep(self, name: str) -> Step:
        """Run a sweep and keep its table, its report and all its results."""
        tracking = "sqlite" if importlib.util.find_spec("mlflow") else "none"
        command = [
            *("-m", "ladezeit", "--multirun", f"device={self.arguments.device}", f"model={self.arguments.model}"),
            *SWEEPS[name].format(samples=f"sample=range({self.arguments.samples})").split(),
            *(f"tracking={tracking}", f"hydra.sweep.dir={self.outputs / name}", f"outputs={self.outputs}"),
        ]
        step = Step(name, command)
        if name != "tmpfs":
            self._run(step)
        elif MEMORY.is_dir():
            with tempfile.TemporaryDirectory(prefix="ladezeit-", dir=MEMORY) as memory:
                self._run(step, LADEZEIT_CACHE=memory)
        else:
            step.note = f"left out: this machine has no {MEMORY}"
        keep(self.outputs / name, self.arguments.output / name)
        return step

    def _run(self, step: Step, most_s: float = float("inf"), stdout: int | None = None, **environment: str) -> Step:
        """Run one command in what is left of the budget, for `most_s` seconds at most, and note how it ended."""
        left_s = min(most_s, self.deadline - time.monotonic())
        if left_s < _LEAST_S:
            step.note = "left out: no time left"
            return step
        started = time.monotonic()
        print(f"== {step.name}: {' '.join(step.command)}", flush=True)
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT,
            env=self.environment | environment,
            stdout=stdout,
            stderr=subprocess.STDOUT if stdout is not None else None,
        )
        with ending(process):
            try:
                step.exit_code = process.wait(left_s)
            except subprocess.TimeoutExpired:
                step.note = "ended by the budget"
        if step.exit_code is None:
            step.exit_code = process.returncode
        step.seconds = round(time.monotonic() - started, 1)
        return step


@contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Interrupt `process` at the end, if it still runs, and kill it where it does not end by that."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


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


def cuda_runtime(folder: Path) -> dict[str, str]:
    """Return the variable by which the loader finds ``libcudart.so`` in `folder`, as fastsafetensors asks for it.

    Packages of pip have it under the name with its version alone; empty where there is no such package.
    """
    packages = importlib.util.find_spec("nvidia")
    places = packages.submodule_search_locations if packages is not None else None
    found = sorted(file for place in places or () for file in Path(place).glob("*/lib/libcudart.so.*"))
    if not found:
        return {}
    folder.mkdir()
    (folder / "libcudart.so").symlink_to(found[-1])
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]))}


@contextmanager
def gpu_kept_awake() -> Iterator[None]:
    """Hold the driver's library open: without persistence mode a GPU that nobody holds starts anew for each sample."""
    import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        pynvml.nvmlDeviceGetHandleByIndex(0)
    try:
        yield
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


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


def files_with_gpu_tests() -> list[str]:
    """Return the files of tests that have any for a GPU, those that say the most first.

    Others may import what is not there, and the budget may end before the last.
    """
    files = (ROOT / "tests").rglob("test_*.py")
    found = [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text()]
    return sorted(found, key=lambda file: (file.startswith(_LAST_TESTS), not file.startswith(_FIRST_TESTS), file))


def parsed() -> argparse.Namespace:
    """Return the arguments; exits with a message where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "gpu")
    parser.add_argument("--model", default="qwen2.5-7b-shape")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=470)
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself where there is no GPU")
    parser.add_argument("--steps", default=",".join(STEPS), help="which steps to run, separated by commas")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps.split(",")
    if unknown := [name for name in arguments.steps if name not in STEPS]:
        parser.error(f"there is no step {', '.join(unknown)}; the steps are {', '.join(STEPS)}")
    return arguments


def main() -> None:
    """Run the steps and leave the report; exit 1 where the tests, also unfinished ones, or a whole sweep failed."""
    arguments = parsed()
    check_libraries()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored, and so our steps
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    report = Report(describe_machine())
    with tempfile.TemporaryDirectory() as folder, gpu_kept_awake():
        lay_out(Path(folder) / "site")
        runner = Runner(Path(folder) / "site", arguments)
        for name in STEPS:
            if name in arguments.steps:
                report.steps.append(runner.step(name))
                (output / "gpu.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    archive = output / "gpu.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        for path in sorted(output.iterdir()):
            if path != archive:
                packed.add(path, path.name)
    print(json.dumps(asdict(report)))
    # a sweep's exit code 1 says that some samples are not ok, as where an engine cannot run here: the results tell
    good = all(
        step.exit_code == 0 if step.name == "tests" else step.note or step.exit_code in (0, 1) for step in report.steps
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
