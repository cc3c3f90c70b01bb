"""What is found out before a sample becomes its result: a reason, and whether memory ran out or nothing was tried."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from configs_for_tests import make_run_config
from ladezeit.config import CacheConfig, CacheState
from ladezeit.errors import CheckpointError, LadezeitError, NotRunnableError, OutOfMemoryError
from ladezeit.results.records import Identity, Status
from ladezeit.sweep.job import not_started
from ladezeit.sweep.session import Session
from ladezeit.system.page_cache import resident_share, why_never_cold
from ladezeit.system.processes import run_module_json
from ladezeit.system.residency import filesystem_type
from required_parts import require

HERE = Path(__file__).parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (NotRunnableError("loading.engine=x needs a GPU"), Status.skipped),
        (CheckpointError("shard 2 is missing"), Status.skipped),
        (OutOfMemoryError("memory ran out in its reference load"), Status.oom),
    ],
)
def test_a_refusal_is_recorded_as_what_it_is(refusal: LadezeitError, status: Status, tmp_path: Path) -> None:
    """A reference load that a full GPU ended is counted with the loads that it ended, not with what makes no sense."""
    result = not_started(make_run_config(tmp_path), Identity("0" * 12, 0, 0, "test", [], "ladezeit"), refusal)
    assert (result.status, result.reason) == (status, str(refusal))


def test_a_reference_load_that_finds_no_memory_is_out_of_memory() -> None:
    """Its process tells by its exit code, whichever library had asked for the memory."""
    with pytest.raises(OutOfMemoryError, match=r"model=tiny: memory ran out in its reference load: .*can't allocate"):
        run_module_json("references_for_tests", {"ask_for_bytes": 2**50}, "model=tiny", "its reference load")
    with pytest.raises(CheckpointError, match=r"model=tiny: its reference load failed: .*KeyError"):
        run_module_json("references_for_tests", {}, "model=tiny", "its reference load")
    answer = run_module_json("references_for_tests", {"ask_for_bytes": 1}, "model=tiny", "its reference load")
    assert answer == {"had_bytes": 1}


def test_what_a_process_says_of_a_file_is_printable_and_short() -> None:
    """A tensor's name with control characters in it does not reach the terminal that shows the error."""
    with pytest.raises(CheckpointError) as error:
        run_module_json("references_for_tests", {"says": "\x1b[2J" + "x" * 1000}, "model=tiny", "its reference load")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


@pytest.fixture(scope="module")
def deaf_system(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes whose system neither lets go of cached files nor tells the truth of them."""
    require(shutil.which("gcc"), "needs gcc: apt-get install gcc")
    library = tmp_path_factory.mktemp("deaf") / "deaf.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(HERE / "deaf_system.c"), "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


@pytest.fixture
def session() -> Iterator[Session]:
    with ExitStack() as stack:
        made = Session()
        stack.callback(made.close)
        yield made


def asked(state: CacheState, outputs: Path) -> Any:
    return make_run_config(outputs, cache=CacheConfig(state))


def test_a_disk_can_be_cold_and_nothing_stays_of_the_trial(session: Session, tmp_path: Path) -> None:
    """Where the state can be had it is: the checkpoint's own pages are not touched to find that out."""
    if filesystem_type(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("temporary files lie in memory here: give pytest a --basetemp on a disk")
    (tmp_path / "shard").write_bytes(os.urandom(2**20))
    assert why_never_cold(tmp_path) is None
    assert resident_share([tmp_path / "shard"]) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["shard"]


def test_in_memory_nothing_is_tried(tmp_path: Path) -> None:
    """tmpfs is memory: the reason names it, and what to set."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or filesystem_type(memory) != "tmpfs":
        pytest.skip("there is no tmpfs to write to")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        reason = str(why_never_cold(Path(folder)))
    assert reason == f"{folder} lies on tmpfs, which is memory and never cold. Put it on a disk (LADEZEIT_CACHE)"


def test_a_system_that_keeps_its_cache_is_found_out(tmp_path: Path, deaf_system: dict[str, str]) -> None:
    """Its advice is ignored and all pages are called resident: no load there can be known to be cold."""
    program = (
        "import sys; from pathlib import Path; from ladezeit.system.page_cache import why_never_cold; "
        "print(why_never_cold(Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | deaf_system,
        capture_output=True,
        text=True,
        check=True,
    )
    if filesystem_type(tmp_path) not in ("tmpfs", "ramfs"):
        assert done.stdout.startswith(f"the system (kernel {os.uname().release}) keeps files of {tmp_path} (")
        assert "Use cache=warm or cache=as_is" in done.stdout


def test_where_no_file_can_be_made_nothing_is_refused(tmp_path: Path) -> None:
    """A checkpoint in a folder of somebody else may be cold all the same: its samples will tell."""
    assert why_never_cold(tmp_path / "missing") is None


def test_a_file_system_is_tried_once(
    session: Session, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep of a thousand points asks once, and states that need nothing of the kind never do."""
    tried: list[Path] = []

    def tries(folder: Path) -> str | None:
        tried.append(folder)
        return "it is never cold"

    monkeypatch.setattr("ladezeit.sweep.session.why_never_cold", tries)
    for state in (CacheState.warm, CacheState.as_is):
        session.check_cache_state(asked(state, tmp_path))
    assert tried == []
    for state in (CacheState.cold, CacheState.half, CacheState.cold):
        with pytest.raises(NotRunnableError, match=f"cache={state.value} cannot be had: it is never cold"):
            session.check_cache_state(asked(state, tmp_path))
    assert tried == [tiny.shards[0].resolve().parent]


@pytest.mark.slow
def test_what_cannot_be_cold_is_skipped_and_the_rest_is_measured(
    ladezeit: Run, tmp_path: Path, deaf_system: dict[str, str]
) -> None:
    """In a sandbox a sweep says before its first load which points it leaves out, and why; none is called invalid."""
    shown = ladezeit(
        "-m", "model=tiny", "device=cpu", "process=fresh", "inference=none", "ceilings=off", "discard_first=off",
        "tracking=none", "cache=cold,half,as_is", "sample=0,1", **deaf_system,
    )  # fmt: skip
    results = [json.loads(path.read_text()) for path in (tmp_path / "outputs" / "sweeps").rglob("result.json")]
    by_state = {result["config"]["cache"]["state"]: result for result in results}
    assert {state: result["status"] for state, result in by_state.items()} == {
        "cold": "skipped", "half": "skipped", "as_is": "ok",
    }, shown.stdout + shown.stderr  # fmt: skip
    assert "cannot be had: the system (kernel" in by_state["half"]["reason"]
    assert "will be skipped: cache=cold cannot be had" in " ".join(shown.stdout.split())
    assert shown.stderr.count("asked to let go of a file") <= 5  # of one file, a few times
