"""Smoke test, GPU tests, verification, engines and case study on the 7B shape. No network needed.

    python benchmarks/gpu.py [--call 1|2|3] [--wheels .whl] [--output FOLDER] [--model qwen2.5-7b-shape] [--samples 3]
                             [--budget-s 540] [--device cuda] [--steps smoke,tests,…]

A *call* is made for a machine that is there for ten minutes and gone afterwards; three of them are everything
(`gpu_calls.py` has the steps of each). Where a network is, get what a call brings along, then take tree and wheels to
the machine:

    python benchmarks/gpu_wheels.py --call 1 --into .whl
    python benchmarks/gpu.py --call 1 --wheels .whl

Without ``--call`` all steps run, in the time of three calls. It runs from a bare checkout: nothing has to be installed
but the libraries (torch, transformers, accelerate, safetensors, rich, psutil, nvidia-ml-py, matplotlib, pytest; what
else a test imports: a file of tests whose library is missing is an error of that file alone) and what ``--wheels``
brings. The package is laid out in a temporary folder, where its `conf/` is `ladezeit.conf` as in an install.

The smoke step comes first and ends everything where it fails. The 15 GB checkpoint is written into LADEZEIT_CACHE while
the tests run, and copied into memory for the step `tmpfs`. A step takes at most its share of the budget; a sweep that
this ends is interrupted as by Ctrl-C and keeps what it has, and a step for which no time is left is left out:
`gpu.json` says both. TMPDIR should be on a disk: tests of the page cache want one.

What comes back, in the output folder: `gpu.tar.gz` with all files of the steps that ended (of a sweep its table, its
report and ``<name>.jsonl``, every result), `gpu.json` with machine, steps, seconds, exit codes and the sha256 of each
file. Both are renewed after each step, whole at any moment; what the running step has so far (its output, its results)
lies loose beside them. A run that is killed has lost nothing. The last line of output is `gpu.json`'s content. Exit
code 1 where a test or a whole sweep failed, or any sample is wrong; samples that cannot run on a machine are skipped,
which is no failure.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType

from gpu_calls import (
    CALLS,
    NEEDED,
    ROOT,
    SHARES,
    STEPS,
    SWEEPS,
    WITHOUT_CHECKPOINT,
    gpu_tests,
    missing,
    ring_options,
)
from gpu_kept import REPORT, Following, Kept, Step, lines_of, results_of
from gpu_wheels import install

MEMORY = Path("/dev/shm")
CALL_S = 540.0
#: No step is begun with less than this.
_LEAST_S = 20.0
#: An interrupted sweep writes its table and its report within this.
_GRACE_S = 20.0
#: Kept of the budget for the grace of the last step and for the archive.
_END_S = 30.0
#: How often what a sweep has measured is taken down.
_LOOK_S = 1.0
#: A test that hangs is to leave the others their time.
_ONE_TEST = ("-o", "timeout=100")
_CHECKPOINT = "checkpoint"
_PR_SET_PDEATHSIG = 1


class Runner:
    """Runs steps one after another until the budget is spent; `started` is the clock's time at the program's start."""

    def __init__(self, work: Path, arguments: argparse.Namespace, kept: Kept, started: float) -> None:
        self.arguments, self.kept, self.work = arguments, kept, work
        self.deadline = started + arguments.budget_s - _END_S
        path = [str(work / "site"), *arguments.site, os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
        self.environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **cuda_runtime(work / "runtime")}
        self._writing: subprocess.Popen[bytes] | None = None
        self._checkpoint: Path | None = None

    def run(self, names: list[str]) -> None:
        """Run the steps of these names; where the smoke step fails, nothing after it."""
        large = next((name for name in names if name not in WITHOUT_CHECKPOINT), None)
        unfit = False
        with ExitStack() as stack:
            for name in names:
                if unfit:
                    self.kept.end(Step(name, note="left out: the smoke step failed"))
                    continue
                if large and name != "smoke" and self._writing is None:  # the smoke step's rates want a quiet machine
                    self._write_checkpoint(stack)
                if name == large:
                    self._step(_CHECKPOINT, self._await_checkpoint)
                step = self._step(name, self._runs(name))
                unfit = name == "smoke" and step.failed

    def _step(self, name: str, run: Callable[[Step], None]) -> Step:
        """Run one step and keep its files, whatever ends it."""
        step = Step(name)
        self.kept.begin(name)
        try:
            run(step)
        except BaseException as error:
            step.failed, step.note = True, step.note or f"ended by {type(error).__name__} {error}".strip()
            raise
        finally:
            self.kept.end(step)
            counts = ", ".join(f"{count} {status}" for status, count in step.statuses.items())
            words = filter(None, [f"exit code {step.exit_code}", counts, step.note])
            print(f"== {name}: {step.seconds} s, {'; '.join(words)}", flush=True)
        return step

    def _runs(self, name: str) -> Callable[[Step], None]:
        single = {"smoke": self._smoke, "tests": self._tests, "tests_other": self._tests, "proof": self._proof}
        return single.get(name, self._sweep)

    def _smoke(self, step: Step) -> None:
        output = self.arguments.output / "smoke.json"
        step.command = ["benchmarks/gpu_smoke.py", "--device", self.arguments.device, "--output", str(output)]
        self._run(step)
        step.failed = step.exit_code != 0

    def _tests(self, step: Step) -> None:
        options = ["-v", "--tb=short", "--durations=10", "-m", "gpu", "-p", "no:cacheprovider", *_ONE_TEST]
        files = gpu_tests(first=step.name == "tests")
        step.command = ["-m", "pytest", *options, "--continue-on-collection-errors", *files]
        self._run(step)
        step.failed = step.exit_code not in (0, None)  # also where time ended them

    def _proof(self, step: Step) -> None:
        """Make the manifests, then measure the proof of contents beside one pass over the device's memory."""
        output = self.arguments.output / "proof.json"
        given = ["--model", self.arguments.model, "--device", self.arguments.device, "--samples", "5"]
        step.command = ["benchmarks/proof.py", *given, "--manifests", "bfloat16", "float16", "--output", str(output)]
        self._run(step)
        step.failed = not step.note and step.exit_code != 0

    def _sweep(self, step: Step) -> None:
        """Run a sweep and keep its table, its report and all its results."""
        sweep, folder = SWEEPS[step.name], self.work / "outputs" / step.name
        lacking = list(missing(sweep.needs_any))
        if lacking and len(lacking) == len(sweep.needs_any):
            step.note = f"left out: {', '.join(lacking)}"
            return
        step.command = [
            *("-m", "ladezeit", "--multirun", "--config-dir", str(ring_options(self.work / "options"))),
            *(f"device={self.arguments.device}", f"model={self.arguments.model}", "tracking=none"),
            f"process.time_limit_s={sweep.limit_s}",
            *sweep.overrides.format(samples=f"sample=range({self.arguments.samples})").split(),
            *(f"hydra.sweep.dir={folder}", f"outputs={folder.parent}"),
        ]
        follow = Following(folder, self.arguments.output / f"{step.name}.jsonl").look
        if step.name == "tmpfs":
            self._in_memory(step, follow)
        else:
            self._run(step, follow)
        if step.exit_code is None:
            return
        for name, suffix in (("summary.md", ".md"), ("report/report.html", ".html")):
            if (folder / name).exists():
                shutil.copy(folder / name, self.kept.work / f"{step.name}{suffix}")
        results = results_of(folder)
        if results:
            (self.kept.work / f"{step.name}.jsonl").write_bytes(lines_of(results))
        step.judge(results)

    def _in_memory(self, step: Step, follow: Callable[[], None]) -> None:
        """Run a sweep on a copy of the checkpoint in a file system that is memory."""
        checkpoint = self._checkpoint
        if checkpoint is None or not MEMORY.is_dir():
            step.note = f"left out: there is no {MEMORY if checkpoint else 'checkpoint to copy'}"
            return
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        size, free = sum(path.stat().st_size for path in files), shutil.disk_usage(MEMORY).free
        if free < 1.02 * size:
            step.note = f"left out: {MEMORY} has {free / 1e9:.1f} GB free, the checkpoint {size / 1e9:.1f} GB"
            return
        with tempfile.TemporaryDirectory(prefix="ladezeit-", dir=MEMORY) as memory:
            copy = Path(memory) / checkpoint.name
            for folder in {path.parent for path in files}:
                (copy / folder.relative_to(checkpoint)).mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda path: shutil.copy2(path, copy / path.relative_to(checkpoint)), files))
            self._run(step, follow, LADEZEIT_CACHE=memory)

    def _write_checkpoint(self, stack: ExitStack) -> None:
        """Begin to write the checkpoint, beside steps that need none; `stack` ends it at the latest."""
        output = (self.work / "checkpoint.json").open("wb")
        command = ["benchmarks/gpu_checkpoint.py", self.arguments.model]
        with output, (self.arguments.output / f"{_CHECKPOINT}.log").open("wb") as log:
            self._writing = self._start(command, output.fileno(), log.fileno())
        stack.enter_context(ending(self._writing))

    def _await_checkpoint(self, step: Step) -> None:
        """Wait until the checkpoint is written; where it is not, the steps that need it write it, or say why not."""
        assert self._writing is not None
        step.command = ["benchmarks/gpu_checkpoint.py", self.arguments.model]
        self._watch(step, self._writing, lambda: None)
        step.failed = step.exit_code != 0
        if not step.failed:
            told = (self.work / "checkpoint.json").read_text()
            (self.kept.work / "checkpoint.json").write_text(told)
            self._checkpoint = Path(json.loads(told)["folder"])

    def _run(self, step: Step, follow: Callable[[], None] = lambda: None, **environment: str) -> None:
        """Run a step's command in what is left of its share and of the budget, and note how it ended."""
        if self.deadline - time.monotonic() < _LEAST_S:
            step.note = "left out: no time left"
            return
        print(f"== {step.name}: {' '.join(step.command)}", flush=True)
        log = self.arguments.output / f"{step.name}.log"
        with log.open("wb") as file:
            process = self._start(step.command, file.fileno(), file.fileno(), **environment)
        self._watch(step, process, follow)
        print("\n".join(log.read_text(errors="replace").splitlines()[-15:]), flush=True)

    def _start(self, command: list[str], output: int, errors: int, **environment: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=self.environment | environment,
            stdout=output,
            stderr=errors,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 (no thread of this program is at work while it starts any)
        )

    def _watch(self, step: Step, process: subprocess.Popen[bytes], follow: Callable[[], None]) -> None:
        """Wait for a process until its time is up, then interrupt it; `follow` looks at what it has done so far."""
        started = time.monotonic()
        until = min(self.deadline, started + SHARES.get(step.name, 1.0) * self.arguments.budget_s)
        with ending(process):
            while process.poll() is None:
                left_s = until - time.monotonic()
                if left_s <= 0:
                    step.note = "ended by the budget"
                    break
                with suppress(subprocess.TimeoutExpired):
                    process.wait(min(_LOOK_S, left_s))
                follow()
        step.exit_code = process.returncode
        step.seconds = round(time.monotonic() - started, 1)


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


def _end_with_parent() -> None:
    """Have the kernel end this process, which a step becomes, when `gpu.py` is killed: nothing measures on unseen."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def lay_out(site: Path) -> None:
    """Make the checkout importable as an install would be, without installing anything."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "src" / "ladezeit", site / "ladezeit", ignore=ignored)
    shutil.copytree(ROOT / "conf", site / "ladezeit" / "conf", ignore=ignored)
    shutil.copytree(ROOT / "src" / "hydra_plugins", site / "hydra_plugins", ignore=ignored)
    build_extensions(site)


def build_extensions(site: Path) -> None:
    """Compile the extensions of `pyproject.toml`, which are plain C, where there is a compiler; it works without."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    for extension in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]:
        if compiler is None:
            print(f"no C compiler: {extension['name']} is left out", flush=True)
            continue
        target = site.joinpath(*extension["name"].split(".")).with_suffix(".so")
        sources = [str(ROOT / source) for source in extension["sources"]]
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-pthread", "-o", str(target), *sources], check=False)


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
        for number in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):  # a lost one must not let the others sleep
                pynvml.nvmlDeviceGetHandleByIndex(number)
    try:
        yield
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def check_libraries() -> None:
    """Stop with one clear message where a library is missing: there is no network to get it from."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        sys.exit(
            f"gpu.py needs {', '.join(lacking)} importable by {sys.executable}; nothing was started. Where a network "
            f"is, gpu_wheels.py gets them for --wheels"
        )


def describe_machine() -> str:
    """Return the GPU as its own tool describes it, or that there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,pcie.link.gen.max", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no GPU: {error}"


def parsed() -> argparse.Namespace:
    """Return the arguments; exits with a message where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--call", type=int, choices=list(CALLS), help="the steps of one call; all steps without it")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first, for this run alone")
    parser.add_argument("--output", type=Path, help="outputs/gpu/<time> unless given")
    parser.add_argument("--model", default="qwen2.5-7b-shape")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--budget-s", type=float, help=f"{CALL_S:.0f} for a call, {3 * CALL_S:.0f} for all steps")
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself where there is no GPU")
    parser.add_argument("--steps", help="which steps to run instead, separated by commas")
    arguments = parser.parse_args()
    chosen = CALLS[arguments.call].steps if arguments.call else STEPS
    arguments.steps = arguments.steps.split(",") if arguments.steps else list(chosen)
    if unknown := [name for name in arguments.steps if name not in STEPS]:
        parser.error(f"there is no step {', '.join(unknown)}; the steps are {', '.join(STEPS)}")
    arguments.budget_s = arguments.budget_s or (CALL_S if arguments.call else len(CALLS) * CALL_S)
    arguments.output = arguments.output or ROOT / "outputs" / "gpu" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    arguments.output = arguments.output.absolute()
    return arguments


def interrupted(number: int, frame: FrameType | None) -> None:
    """End as by Ctrl-C; a shell's background has that ignored, and so would our steps."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> None:
    """Run the steps and leave archive and report."""
    started = time.monotonic()
    arguments = parsed()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    with tempfile.TemporaryDirectory(prefix="ladezeit-gpu-") as folder:
        work = Path(folder)
        arguments.site = [str(install(arguments.wheels, work / "wheels"))] if arguments.wheels else []
        sys.path[:0] = arguments.site
        check_libraries()
        asked = {key: getattr(arguments, key) for key in ("call", "model", "device", "samples", "budget_s")}
        try:
            kept = Kept(arguments.output, work / "kept", {"machine": describe_machine(), **asked})
        except FileExistsError as error:
            sys.exit(str(error))
        print(f"everything goes to {arguments.output}; a running step's output is its .log there", flush=True)
        lay_out(work / "site")
        with gpu_kept_awake():
            try:
                Runner(work, arguments, kept, started).run(arguments.steps)
            except KeyboardInterrupt as reason:
                print(f"interrupted ({reason}): what was measured is kept", file=sys.stderr)
                sys.exit(130)
    print(json.dumps(json.loads((arguments.output / REPORT).read_text())))
    sys.exit(1 if any(step.failed for step in kept.steps) else 0)


if __name__ == "__main__":
    main()
