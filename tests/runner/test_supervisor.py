"""Whatever happens to a worker, the user gets one result that says so, and nothing goes on running."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml
import pytest

from configs_for_tests import make_run_config
from known_gpus import Driver, Known
from ladezeit.config import (
    CacheConfig,
    CacheState,
    DType,
    ProcessConfig,
    ProcessKind,
    TransformersLoading,
    ValidationConfig,
    ValidationLevel,
)
from ladezeit.loading.engines.legacy_manager import LegacyManagerLoading, ModuleWalk
from ladezeit.results.records import Identity, Result, Status, read_result
from ladezeit.runner.spec import WorkerSpec
from ladezeit.runner.supervisor import CRASHES, MOST_LOG_BYTES, Supervisor, last_words
from ladezeit.timing.clock import LOAD
from process_states import runs


def limited(seconds: float, kind: ProcessKind = ProcessKind.prewarmed) -> ProcessConfig:
    return ProcessConfig(kind, time_limit_s=seconds)


@pytest.mark.parametrize("kind", list(ProcessKind))
def test_a_load_is_measured_proven_and_spoken_to(
    measure: Callable[..., Result], tmp_path: Path, kind: ProcessKind
) -> None:
    """Each kind of process gives the same kind of result, with phases that add up to the total."""
    result = measure(process=limited(120, kind))
    assert result.status is Status.ok, result.reason
    assert read_result(tmp_path) == result
    metrics = result.metrics
    rate = "load/gb_per_s"
    inside = [v for name, v in metrics.items() if name.startswith("load/") and name.endswith("_s") and name != rate]
    assert sum(inside) == pytest.approx(2 * metrics["load/total_s"], rel=1e-6)  # the total, and its parts
    phases = {phase.path for phase in result.phases}
    assert {"load", "load/skeleton", "load/read", "load/finalise", "load/touch", "validation"} <= phases
    assert result.effective["seams_missing"] == []
    assert result.proof and result.proof["passed"] and result.proof["tensors_seen"] > 40
    assert len(result.effective["inference"]["token_ids"]) == 3
    assert ("cold_start/first_token_s" in metrics) == (kind is ProcessKind.fresh)
    together = metrics["load/total_s"] + metrics["inference/first_token_s"]
    assert metrics["inference/load_and_first_token_s"] == pytest.approx(together)
    assert result.environment["from"] == "the supervisor"


@pytest.mark.gpu
def test_a_prewarmed_sample_finds_its_gpu(measure: Callable[..., Result]) -> None:
    """Whatever is imported before the fork, torchao and its kernels too, leaves the GPU to the sample."""
    result = measure(device="cuda:0")
    assert result.status is Status.ok, result.reason
    assert result.effective["device"] == "cuda:0"
    assert result.metrics["memory/gpu_allocated_peak_gib"] > 0


def test_a_fresh_process_pays_for_its_imports_and_a_prewarmed_one_does_not(measure: Callable[..., Result]) -> None:
    """The import is a phase of its own, outside of the load, and the server's import time is recorded."""
    result = measure()
    imported = [phase for phase in result.phases if phase.path == "import"]
    assert imported and imported[0].duration_s < 1
    assert result.environment["prewarm"]["import_s"] > 0.2
    assert not any(phase.path.startswith("load/import") for phase in result.phases)


def test_phases_off_reports_the_total_alone(measure: Callable[..., Result]) -> None:
    result = measure(phases=False)
    assert result.status is Status.ok
    assert [phase.path for phase in result.phases if phase.path.startswith(LOAD)] == [LOAD]
    assert result.metrics["load/unattributed_s"] == result.metrics["load/total_s"]


def test_live_progress_names_phases_while_they_run(measure: Callable[..., Result]) -> None:
    told: list[str] = []
    measure(progress=told.append)
    assert told.index("load/skeleton") < told.index("load/read") < told.index("validation")


def test_a_hang_is_ended_with_everything_it_started(measure: Callable[..., Result], tmp_path: Path) -> None:
    """Deaf to SIGTERM and with a child of its own: the time limit ends both, and the log says where it hung."""
    result = measure("Hangs", process=limited(8))  # on a busy machine it takes seconds until it hangs
    assert result.status is Status.timeout
    assert result.reason and "8 s" in result.reason
    assert result.error and "in load" in result.error.trace, "the stacks show where it hung"
    child = int((tmp_path / "child.pid").read_text())
    deadline = time.monotonic() + 5
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(child)


@pytest.mark.parametrize("kind", [ProcessKind.fresh, ProcessKind.prewarmed])
def test_a_kill_from_outside_leaves_a_result_with_the_last_words(
    measure: Callable[..., Result], kind: ProcessKind
) -> None:
    result = measure("KilledFromOutside", process=limited(120, kind))
    assert result.status is Status.killed
    assert result.reason and "SIGKILL" in result.reason
    assert result.error and "last words before the end" in result.error.trace


def test_a_crash_names_the_signal_and_keeps_the_stack(measure: Callable[..., Result]) -> None:
    result = measure("Crashes")
    assert result.status is Status.failed
    assert result.reason and "crashed with SIGSEGV" in result.reason
    assert result.error and "engines_for_tests.py" in result.error.trace


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        *((number, "failed", f"the worker crashed with {number.name}") for number in sorted(CRASHES)),
        (signal.SIGKILL, "killed", "ended by SIGKILL from outside"),
        (signal.SIGTERM, "killed", "ended by SIGTERM from outside"),
        (signal.SIGRTMIN + 3, "killed", "ended by SIGRTMIN+3 from outside"),
    ],
)
def test_each_signal_says_whether_the_worker_or_somebody_else_was_to_blame(
    measure: Callable[..., Result], tmp_path: Path, number: int, status: str, said: str
) -> None:
    """A crash counts against the loading method, a kill does not; a signal without a name is no defect of ours."""
    (tmp_path / "signal").write_text(str(int(number)))
    result = measure("EndsBySignal")
    assert result.status is Status(status), result.reason
    assert said in str(result.reason)


def test_a_result_that_cannot_be_read_is_a_failed_sample(measure: Callable[..., Result], tmp_path: Path) -> None:
    """A damaged file costs one sample, not the sweep, and is kept for whoever looks into it."""
    result = measure("WritesItsOwnResult")
    assert result.status is Status.failed and "result.unreadable.json" in str(result.reason)
    assert read_result(tmp_path) == result
    assert (tmp_path / "result.unreadable.json").read_text() == '{"status": "o'


@pytest.mark.parametrize("kind", [ProcessKind.fresh, ProcessKind.prewarmed])
def test_a_folder_that_is_removed_costs_one_sample(
    measure: Callable[..., Result], tmp_path: Path, kind: ProcessKind
) -> None:
    """Whoever cleans up under a running sweep loses that sample's figures, and still has a result that says so."""
    result = measure("RemovesItsFolder", process=limited(120, kind))
    assert result.status is Status.failed, result.reason
    assert read_result(tmp_path) == result


def test_a_log_keeps_its_beginning_and_its_end(measure: Callable[..., Result], tmp_path: Path) -> None:
    """A library that warns for each tensor does not fill the disk that the results go to."""
    (tmp_path / "mebibytes").write_text("3072")
    result = measure("TellsTooMuch")
    assert result.status is Status.ok, result.reason
    log = (tmp_path / "worker.log").read_bytes()
    assert len(log) <= MOST_LOG_BYTES
    assert (
        log.startswith(b"the first words\n")
        and b"the last words\n" in log[-MOST_LOG_BYTES // 4 :]
        and b" bytes left out" in log
    )


def test_odd_values_do_not_cost_the_sample(measure: Callable[..., Result], tmp_path: Path) -> None:
    """An engine may report what JSON has no words for: numbers become null, the rest its text."""
    result = measure("TellsOddThings")
    assert result.status is Status.ok, result.reason
    assert read_result(tmp_path).effective["odd"] == {
        "nan": None, "infinite": [None], "dtype": "torch.float16", "path": "/a", "surrogate": "a\\udcffb",
        "7": "{3}", "('a', 1)": "tensor(2.5000)",
    }  # fmt: skip


def test_a_library_that_aborts_because_memory_ran_out_is_out_of_memory(measure: Callable[..., Result]) -> None:
    """Nobody looks for a signal from outside where a C++ engine could not have its buffer."""
    result = measure("AbortsForMemory")
    assert result.status is Status.oom
    assert result.reason and "memory ran out" in result.reason
    assert result.error and "std::bad_alloc" in result.error.trace


def test_the_stack_of_a_crash_is_kept_beside_hundreds_of_extension_modules(tmp_path: Path) -> None:
    """The interpreter names them all in one line after the stack: it must not push the stack out of the report."""
    modules = ", ".join(f"package.extension_module_{n}" for n in range(400))
    (tmp_path / "worker.log").write_text(
        "noise\n" * 5000 + f"Fatal Python error: Segmentation fault\n  File 'a.py', line 7 in load\n\n"
        f"Extension modules: {modules} (total: 400)\n"
    )
    words = last_words(tmp_path)
    assert "line 7 in load" in words and "extension_module_399" not in words
    assert len(words) <= 4000


def test_leaving_without_a_result_is_a_failure(measure: Callable[..., Result]) -> None:
    result = measure("Leaves")
    assert (result.status, "exit code 7" in str(result.reason)) == (Status.failed, True)


@pytest.mark.parametrize(
    "engine, status, kind",
    [
        ("RunsOutOfMemory", "oom", "MemoryError"),
        ("FillsTheGpu", "oom", "LoadError"),
        ("FillsTheHost", "oom", "RuntimeError"),
        ("FindsNoProcess", "oom", "RuntimeError"),
        ("Raises", "failed", "RuntimeError"),
    ],
)
def test_an_error_in_the_engine_keeps_what_was_measured_before_it(
    measure: Callable[..., Result], engine: str, status: str, kind: str
) -> None:
    """The phases up to the error stay in the result, with the error's type and trace."""
    result = measure(engine)
    assert result.status is Status(status)
    assert result.error and result.error.type == kind and "engines_for_tests.py" in result.error.trace
    assert "load" in {phase.path for phase in result.phases}
    assert result.metrics["load/total_s"] > 0


def test_a_model_that_is_not_what_was_asked_for_is_wrong_and_does_not_speak(measure: Callable[..., Result]) -> None:
    result = measure("ForgetsTheHead")
    assert result.status is Status.wrong
    assert result.proof and not result.proof["passed"]
    assert "tie" in str(result.reason) and "lm_head" in str(result.reason)
    assert "inference" not in result.effective


def test_a_cold_sample_that_was_not_cold_is_invalid(measure: Callable[..., Result]) -> None:
    """What was set before the process started was undone since: no figure comes of it."""
    result = measure("WarmsTheCache", cache=CacheConfig(CacheState.cold))
    assert result.status is Status.invalid
    assert "load/total_s" not in result.metrics
    assert result.metrics["cache/resident_before_share"] > 0.5


def test_a_warm_file_that_the_system_took_back_is_warmed_again(measure: Callable[..., Result]) -> None:
    """A machine that takes cached pages back while processes start costs no sample, and the result tells."""
    result = measure("LosesTheCache", cache=CacheConfig(CacheState.warm))
    assert result.status is Status.ok, result.reason
    assert result.metrics["cache/resident_before_share"] > 0.99
    assert result.effective["warmed_again_from_share"] < 0.5


@pytest.mark.parametrize("state", [CacheState.cold, CacheState.warm])
def test_the_cache_state_is_what_was_asked_for_when_the_load_starts(
    measure: Callable[..., Result], state: CacheState
) -> None:
    result = measure(cache=CacheConfig(state))
    assert result.status is Status.ok, result.reason
    share = result.metrics["cache/resident_before_share"]
    assert share < 0.01 if state is CacheState.cold else share > 0.99
    assert result.metrics["cache/resident_after_share"] > 0.9


def test_offload_nobody_asked_for_is_refused(measure: Callable[..., Result], tmp_path: Path) -> None:
    """The origin's rule: a model that does not fit is an error, never a slow model."""
    loading = TransformersLoading(
        name="auto", device_map="auto", max_memory={"cpu": "1MiB"}, offload_folder=str(tmp_path / "offload")
    )
    result = measure(loading=loading)
    assert result.status is Status.wrong
    assert result.reason and "offloaded" in result.reason and "disable_cpu_offload" in result.reason


def test_offload_that_was_asked_for_is_no_error(measure: Callable[..., Result], tmp_path: Path) -> None:
    loading = TransformersLoading(
        name="auto",
        device_map="auto",
        max_memory={"cpu": "1MiB"},
        offload_folder=str(tmp_path / "offload"),
        disable_cpu_offload=False,
    )
    result = measure(loading=loading)
    assert result.status is Status.ok, result.reason
    assert "disk" in result.effective["device_map"].values()


def test_the_legacy_manager_shows_its_overhead_as_phases(measure: Callable[..., Result]) -> None:
    """Settings read twice and every module walked: each a phase of its own, so that the cause has a name."""
    loading = LegacyManagerLoading(
        name="legacy_manager", dtype=DType.float16, device_map="device", max_memory={"device": "90%"}
    )
    result = measure(loading=loading)
    assert result.status is Status.ok, result.reason
    assert len([phase for phase in result.phases if phase.path == "load/settings"]) == 2
    assert result.metrics["load/module_walk_s"] > 0
    assert set(result.effective["arguments"]["max_memory"]) == {"cpu"}


def test_a_manager_that_looks_at_all_values_says_how_long_that_takes(measure: Callable[..., Result]) -> None:
    """What makes a walk expensive can be measured too: the same settings, and each weight looked at, level by level."""
    loading = LegacyManagerLoading(
        name="legacy_manager_values", dtype=DType.float16, device_map="device", walk=ModuleWalk.values
    )
    result = measure(loading=loading)
    assert result.status is Status.ok, result.reason
    assert result.metrics["load/module_walk_s"] > 0
    assert result.effective["not_finite_found"] == 0 and "meta_tensors_found" not in result.effective


def test_nothing_is_validated_where_nothing_was_asked(measure: Callable[..., Result]) -> None:
    result = measure(validation=ValidationConfig(ValidationLevel.none))
    assert result.status is Status.ok
    assert result.proof and not result.proof["passed"] and not result.proof["ran"]


def test_ctrl_c_ends_the_worker_and_leaves_a_result(measure: Callable[..., Result], tmp_path: Path) -> None:
    started = threading.Event()

    def interrupt() -> None:
        started.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        measure("Steady", progress=lambda phase: started.set() if phase == "load/read" else None)
    result = read_result(tmp_path)
    assert (result.status, result.reason) == (Status.killed, "interrupted")


def test_the_server_goes_on_after_a_worker_that_died(measure: Callable[..., Result]) -> None:
    """One crash in a sweep costs one sample, not the imports of all that follow."""
    assert measure("KilledFromOutside").status is Status.killed
    assert measure().status is Status.ok


def test_a_server_that_dies_costs_one_sample(supervisor: Supervisor, measure: Callable[..., Result]) -> None:
    """The kernel may end the server of a long sweep: that sample is `failed`, the next has a new server."""
    assert measure().status is Status.ok
    (server,) = supervisor._servers.values()
    server._process.kill()
    server._process.wait()
    failed = measure()
    assert failed.status is Status.failed and "server for prewarmed samples" in str(failed.reason)
    assert measure().status is Status.ok


@pytest.mark.parametrize("stopped", ["between samples", "while a sample runs", "while a sample hangs"])
def test_a_server_that_is_stopped_holds_nothing_up(
    supervisor: Supervisor, measure: Callable[..., Result], stopped: str
) -> None:
    """A sweep goes on with a new server; what the old one could not do is a `timeout`, what it had done is kept."""
    assert measure().status is Status.ok
    (server,) = supervisor._servers.values()

    def stop(phase: str) -> None:
        if phase == "load/read":
            server._process.send_signal(signal.SIGSTOP)

    if stopped == "between samples":
        stop("load/read")
        result = measure(process=limited(3))
    elif stopped == "while a sample runs":
        result = measure("Steady", progress=stop)
    else:
        result = measure("Hangs", progress=stop, process=limited(8))
    assert result.status is (Status.ok if "runs" in stopped else Status.timeout), result.reason
    assert server._process.poll() is not None, "it was ended, stopped as it was"
    assert measure().status is Status.ok


def test_a_server_that_finds_no_memory_is_out_of_memory(supervisor: Supervisor, measure: Callable[..., Result]) -> None:
    """A host that is full between two samples: that sample is `oom`, as if it had been full in it."""
    assert measure().status is Status.ok
    (server,) = supervisor._servers.values()
    pid = server._process.pid
    has = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (has, before[1]))
    full = measure()
    if server._process.poll() is None:  # it was the sample that found none, and not its server
        resource.prlimit(pid, resource.RLIMIT_AS, before)
    assert full.status is Status.oom, full.reason
    assert measure().status is Status.ok


def test_a_prewarmed_sample_is_told_its_gpus_after_the_fork(
    supervisor: Supervisor, measure: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a lost GPU the others are named by UUID: torch asks CUDA then, and a server that did cannot be forked."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    Driver([Known("GPU-a"), Known("GPU-b", error=pynvml.NVML_ERROR_GPU_IS_LOST), Known("GPU-c")]).install(monkeypatch)
    result = measure("TellsItsGpus")
    assert result.status is Status.ok, result.reason
    assert result.effective["gpus_given"] == "GPU-a,GPU-c"
    for server in supervisor._servers.values():
        assert b"CUDA_VISIBLE_DEVICES" not in Path(f"/proc/{server._process.pid}/environ").read_bytes()


def test_no_load_outlives_its_supervisor(tmp_path: Path) -> None:
    """`kill -9` on ladezeit must not leave a process that holds the GPU."""
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_supervisor import run_engine
run_engine("Hangs", Path({str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    pid_file = tmp_path / "child.pid"
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = _children(process.pid)
    assert workers, "the worker is there"
    process.kill()
    process.wait()
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))
    os.kill(int(pid_file.read_text()), signal.SIGKILL)


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 1 GiB for tests that are root's, on a system that lets them make one."""
    version_1 = Path("/sys/fs/cgroup/memory")
    group = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"ladezeit-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs a control group of its own: {error}")
    limit = group / ("memory.limit_in_bytes" if version_1.is_dir() else "memory.max")
    try:
        limit.write_text(str(2**30))
        yield group
    except OSError as error:
        pytest.skip(f"control groups do not limit memory here: {error}")
    finally:
        group.rmdir()


def test_a_worker_that_the_kernel_ended_for_memory_is_told_from_a_neighbour(small_group: Path, tmp_path: Path) -> None:
    """In a container with a limit the kernel kills without a word: the sample is `oom`, and a plain kill is not."""
    program = f"""
import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
Path({str(small_group / "cgroup.procs")!r}).write_text(str(os.getpid()))
from test_supervisor import run_engine
run_engine("FillsItsControlGroup", Path({str(tmp_path)!r}))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    result = read_result(tmp_path)
    assert result.status is Status.oom, result.reason
    assert "the kernel ended the worker" in str(result.reason)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def run_engine(engine: str, folder: Path) -> None:
    """Run a fresh sample by one of the engines for tests; called in a process of its own."""
    from ladezeit.checkpoint.resolve import prepare_checkpoint
    from ladezeit.system.files import cache_folder

    loading = TransformersLoading(name=engine, engine=f"engines_for_tests:{engine}", device_map="device")
    config = make_run_config(folder, loading=loading, process=limited(300, ProcessKind.fresh))
    checkpoint = prepare_checkpoint(config.model, cache_folder())
    identity = Identity("0" * 12, 0, 0, "test", [], "ladezeit")
    with Supervisor() as supervisor:
        supervisor.run_sample(WorkerSpec(config, checkpoint, identity, "cpu", folder))
