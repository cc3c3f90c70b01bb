"""The ceilings: real reads and copies that leave the checkpoint as it was, and which of them limits which load."""

import contextlib
import hashlib
import json
import math
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladezeit.config import NOT_MEASURED, CacheState
from ladezeit.errors import WorkerError
from ladezeit.sweep.session import CEILINGS_FILE, Session
from ladezeit.system import bandwidth, rates
from ladezeit.system.bandwidth import Ceilings, binding_ceiling, measure_apart, measure_ceilings
from ladezeit.system.gpus import resolve_device
from ladezeit.system.page_cache import resident_share, set_state
from ladezeit.system.residency import filesystem_type

ON_CPU = ("storage", "page_cache", "mapping", "memcpy")
ON_GPU = ("host_to_device_pinned", "host_to_device_pageable", "staged")
KNOWN = Ceilings(
    storage_gb_per_s=2.0,
    page_cache_gb_per_s=20.0,
    mapping_gb_per_s=100.0,
    memcpy_gb_per_s=12.0,
    host_to_device_pinned_gb_per_s=50.0,
    host_to_device_pageable_gb_per_s=8.0,
    staged_gb_per_s=15.0,
)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    if filesystem_type(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("temporary files lie in memory here: give pytest a --basetemp on a disk")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        path.write_bytes(os.urandom(40 * 2**20 + 12345))  # the end of a file is no whole block
    return paths


def check(found: Ceilings, names: tuple[str, ...]) -> None:
    """Check that these rates, and no others, were measured, and how is told."""
    for name in (*ON_CPU, *ON_GPU):
        rate = found.get_rate(name)
        assert (name in names) == (rate is not None) == (name not in found.reasons), (name, found.reasons)
        if rate is not None:
            told = found.tries[name]
            assert math.isfinite(rate) and rate > 0
            assert told["n"] >= 3 and told["threads"] >= 1 and told["bytes"] > 0
            assert 0 < told["least_gb_per_s"] <= rate
    assert found.seconds > 0


@pytest.mark.parametrize("state", [CacheState.cold, CacheState.warm])
def test_all_rates_are_found_and_the_page_cache_stays_as_it_is(shards: list[Path], state: CacheState) -> None:
    """The next sample may ask for the state as it is: measuring must neither warm a cold checkpoint nor cool it."""
    set_state(shards, state)
    before = resident_share(shards)
    check(measure_ceilings("cpu", shards), ON_CPU)
    # A busy system takes pages back by itself; it never brings any in.
    assert before / 2 <= resident_share(shards) <= before + 0.001
    assert sorted(path.name for path in shards[0].parent.iterdir()) == [shard.name for shard in shards]


def test_half_a_checkpoint_in_memory_stays_half(shards: list[Path]) -> None:
    """Shards that are not wholly in memory are never read through the page cache."""
    set_state(shards, CacheState.cold)
    set_state(shards[:1], CacheState.warm)
    check(measure_ceilings("cpu", shards), ON_CPU)
    assert resident_share(shards[:1]) > 0.5
    assert resident_share(shards[1:]) < 0.001


def test_a_checkpoint_in_memory_has_no_storage(tmp_path: Path) -> None:
    """Newer kernels let a tmpfs be opened for direct reads, which would measure memory and call it a disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or filesystem_type(memory) != "tmpfs":
        pytest.skip("there is no tmpfs to write to")
    with tempfile.NamedTemporaryFile(dir=memory) as shard:
        shard.write(os.urandom(8 * 2**20))
        shard.flush()
        found = measure_ceilings("cpu", [Path(shard.name)])
    assert found.storage_gb_per_s is None
    assert found.reasons["storage"] == "the checkpoint lies on tmpfs, which is memory"
    check(found, ("page_cache", "mapping", "memcpy"))


def test_what_cannot_be_measured_says_why(tmp_path: Path) -> None:
    """One rate that fails costs itself alone."""
    missing = tmp_path / "missing" / "model.safetensors"
    found = measure_ceilings("cpu", [missing])
    check(found, ("memcpy",))
    assert "missing" in found.reasons["storage"] and "missing" in found.reasons["mapping"]


def test_a_process_of_its_own_measures_the_same_things(shards: list[Path], tmp_path: Path) -> None:
    """What comes back through the two files is what was measured."""
    check(measure_apart("cpu", shards), ON_CPU)
    request, output = tmp_path / "request.json", tmp_path / "output.json"
    request.write_text(json.dumps({"device": "cpu", "shards": [str(shard) for shard in shards]}))
    command = [sys.executable, "-m", "ladezeit.system.bandwidth", str(request), str(output)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == ""
    plain = json.loads(output.read_text())
    check(Ceilings.from_plain(plain), ON_CPU)
    assert Ceilings.from_plain(plain).to_plain() == plain


def test_a_process_that_hangs_or_breaks_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep goes on without ceilings, and says so."""
    with monkeypatch.context() as patched:
        patched.setattr(bandwidth, "LIMIT_S", 0.001)
        with pytest.raises(WorkerError, match="ceilings took longer than"):
            measure_apart("cpu", [])
    with pytest.raises(WorkerError, match=r"device=cpu: the measurement of its ceilings failed: .*Error"):
        measure_apart("cpu", [])


def test_a_try_moves_each_span_once() -> None:
    """Threads share the work; none is counted twice and none is lost."""
    taken: list[int] = []

    def move(item: int, thread: int) -> int:
        taken.append(item)
        return item

    tried = rates._drive(list(range(1, 200)), move, 8, limit_s=60)
    assert sorted(taken) == list(range(1, 200))
    assert (tried.threads, tried.moved_bytes) == (8, sum(range(1, 200)))
    assert len({*taken}) == 199 and tried.gb_per_s > 0
    assert rates._drive([7], move, 16, limit_s=60).threads == 1


class LateDevice:
    """Host memory as a device whose copies happen as late as they may: when somebody waits for them."""

    def __init__(self, memory: mmap.mmap, slot_bytes: int) -> None:
        self._memory, self._slot_bytes = memory, slot_bytes
        self._begun: dict[int, int] = {}
        self._lock = threading.Lock()
        self.arrived: Counter[bytes] = Counter()
        self.most_under_way = 0

    def copy_slot(self, slot: int, size: int) -> None:
        with self._lock:
            assert slot not in self._begun, "a slot was filled again before its copy was waited for"
            self._begun[slot] = size
            self.most_under_way = max(self.most_under_way, len(self._begun))

    def wait_slot(self, slot: int) -> None:
        with self._lock:
            size = self._begun.pop(slot, None)
        if size is not None:
            start = slot * self._slot_bytes
            found = hashlib.sha256(self._memory[start : start + size]).digest()
            with self._lock:
                self.arrived[found] += 1


@pytest.mark.parametrize("cpus", [1, 3])
def test_copy_and_transfer_go_on_at_the_same_time_and_lose_nothing(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch, cpus: int
) -> None:
    """The ceiling is that of a load: two slots a thread, one filled while the device still reads the other.

    Every byte that a rate counts is on the device, as it is in the file; and every copy has ended when time is taken.
    """
    monkeypatch.setattr(rates, "_STAGED_BYTES", 400 * 2**20)
    set_state(shards, CacheState.warm)
    devices: list[LateDevice] = []

    @contextlib.contextmanager
    def late(memory: mmap.mmap, slot_bytes: int) -> Iterator[LateDevice]:
        devices.append(LateDevice(memory, slot_bytes))
        yield devices[0]
        assert devices[0]._begun == {}

    opened = [os.open(shard, os.O_RDONLY) for shard in shards]
    try:
        tries = rates.measure_staged(opened, cpus, late)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    (device,) = devices
    assert {one.threads for one in tries} == {cpus}
    assert 2 <= device.most_under_way <= 2 * cpus
    pieces: dict[bytes, int] = {}
    for shard in shards:
        content = shard.read_bytes()
        for start in range(0, len(content), rates.SPAN_BYTES):
            piece = content[start : start + rates.SPAN_BYTES]
            pieces[hashlib.sha256(piece).digest()] = len(piece)
    assert set(device.arrived) <= set(pieces)
    assert sum(pieces[digest] * n for digest, n in device.arrived.items()) == sum(one.moved_bytes for one in tries)


@pytest.mark.parametrize(
    ("state", "device", "keeps_dtype", "expected"),
    [
        (CacheState.cold, "cpu", True, ("storage", 2.0)),
        (CacheState.cold, "cpu", False, ("storage", 2.0)),
        (CacheState.cold, "cuda:0", True, ("storage", 2.0)),
        (CacheState.warm, "cpu", True, ("mapping", 100.0)),
        (CacheState.warm, "cpu", False, ("memcpy", 12.0)),
        (CacheState.warm, "cuda:0", True, ("staged", 15.0)),
        (CacheState.warm, "cuda:1", False, ("staged", 15.0)),
    ],
)
def test_the_slowest_stage_binds(
    state: CacheState, device: str, keeps_dtype: bool, expected: tuple[str, float]
) -> None:
    """A load cannot be faster than the slowest thing that all its bytes have to pass."""
    assert binding_ceiling(KNOWN, state, device, keeps_dtype) == expected


def test_a_fast_disk_meets_the_link_to_the_gpu() -> None:
    """Where storage outruns the link, the link is the limit."""
    fast = Ceilings(storage_gb_per_s=60, page_cache_gb_per_s=90, host_to_device_pinned_gb_per_s=25, staged_gb_per_s=20)
    assert binding_ceiling(fast, CacheState.cold, "cuda:0", True) == ("host_to_device_pinned", 25)


def test_copy_and_transfer_share_the_memory_bus() -> None:
    """Neither of the two alone limits a warm load to a GPU: a load that reached the limit would seem to have left room.

    As much of each byte as was in memory takes the time that it takes from there.
    """
    shared = Ceilings(storage_gb_per_s=5, page_cache_gb_per_s=90, host_to_device_pinned_gb_per_s=50, staged_gb_per_s=30)
    assert binding_ceiling(shared, CacheState.warm, "cuda:0", True) == ("staged", 30)
    half = binding_ceiling(shared, CacheState.half, "cuda:0", True, resident_share=0.5)
    assert half == ("staged+storage", pytest.approx(2 / (1 / 30 + 1 / 5)))


@pytest.mark.parametrize(("written_per_read", "expected"), [(1.0, 12.0), (2.0, 8.0), (0.5, 16.0)])
def test_a_conversion_moves_what_it_reads_and_what_it_writes(written_per_read: float, expected: float) -> None:
    """From bfloat16 to float32 three bytes move for each one read, where a copy moves two."""
    found = binding_ceiling(KNOWN, CacheState.warm, "cpu", False, written_per_read=written_per_read)
    assert found == ("memcpy", pytest.approx(expected))


def test_no_ceiling_where_a_stage_was_not_measured() -> None:
    """A limit that leaves out a stage would be called reached too early."""
    assert binding_ceiling(Ceilings(mapping_gb_per_s=9.0), CacheState.cold, "cpu", True) is None
    apart = Ceilings(page_cache_gb_per_s=9.0, host_to_device_pinned_gb_per_s=9.0)
    assert binding_ceiling(apart, CacheState.warm, "cuda:0", True) is None
    for share in (None, math.nan):
        assert binding_ceiling(KNOWN, CacheState.as_is, "cpu", True, resident_share=share) is None
    on_tmpfs = Ceilings(mapping_gb_per_s=9.0)
    assert binding_ceiling(on_tmpfs, CacheState.as_is, "cpu", True, resident_share=1.0) == ("mapping", 9.0)
    assert binding_ceiling(on_tmpfs, CacheState.as_is, "cpu", True, resident_share=0.5) is None


RATES = st.floats(min_value=1e-3, max_value=1e4)


@given(storage=RATES, mapping=RATES, shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_as_is_lies_between_cold_and_warm(storage: float, mapping: float, shares: tuple[float, float]) -> None:
    """The more is in memory, the nearer to the warm ceiling; half and half takes the mean of both times."""
    known = Ceilings(storage_gb_per_s=storage, mapping_gb_per_s=mapping)

    def at(share: float) -> float:
        found = binding_ceiling(known, CacheState.as_is, "cpu", True, resident_share=share)
        assert found is not None
        return found[1]

    low, high = sorted((storage, mapping))
    for share in shares:
        assert low * (1 - 1e-9) <= at(share) <= high * (1 + 1e-9)
    less, more = sorted(shares)
    towards_warm = at(more) - at(less)
    assert towards_warm * (mapping - storage) >= -1e-9 * high * high
    assert 1 / at(0.5) == pytest.approx((1 / storage + 1 / mapping) / 2)
    assert (at(0.0), at(1.0)) == (storage, mapping)


def test_jobs_in_other_processes_find_what_the_sweep_measured(
    tmp_path: Path, tiny: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher may run a job anywhere: the sweep's folder is what they share."""
    cpu = resolve_device("cpu")
    one, other = Session(), Session()
    try:
        monkeypatch.setattr("ladezeit.sweep.session.measure_apart", lambda device, shards: KNOWN)
        assert one.get_ceilings(cpu, tiny) == KNOWN  # type: ignore[arg-type]
        one.save_ceilings(tmp_path)
        assert other.known_ceilings(cpu, tiny) is None  # type: ignore[arg-type]
        other.recall_ceilings(tmp_path / "nowhere")
        other.recall_ceilings(tmp_path)
        assert other.known_ceilings(cpu, tiny) == KNOWN  # type: ignore[arg-type]
    finally:
        one.close()
        other.close()


def test_a_measurement_that_fails_is_noted_once(
    tmp_path: Path, tiny: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without ceilings a sweep is still a sweep."""
    asked: list[str] = []

    def broken(device: str, shards: object) -> Ceilings:
        asked.append(device)
        raise WorkerError("the ceilings could not be measured: no memory")

    monkeypatch.setattr("ladezeit.sweep.session.measure_apart", broken)
    session = Session()
    try:
        cpu = resolve_device("cpu")
        assert session.get_ceilings(cpu, tiny) is None and session.get_ceilings(cpu, tiny) is None  # type: ignore[arg-type]
        session.save_ceilings(tmp_path)
    finally:
        session.close()
    assert asked == ["cpu"] and not (tmp_path / CEILINGS_FILE).exists()
    assert "without ceilings: the ceilings could not be measured: no memory" in capsys.readouterr().out


def test_whether_ceilings_are_measured_makes_no_other_point() -> None:
    """Samples with and without them are compared with each other."""
    assert "ceilings" in NOT_MEASURED


Run = Callable[..., subprocess.CompletedProcess[str]]
BASE = ("model=tiny", "device=cpu", "process=prewarmed", "inference=none", "tracking=none")


@pytest.mark.slow
def test_a_sweep_says_which_share_of_the_ceiling_each_load_reached(ladezeit: Run, tmp_path: Path) -> None:
    """In results and table, for each cache state its own ceiling; the sample that never counts has none."""
    shown = ladezeit("-m", *BASE, "cache=cold,warm", "sample=0,1")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    found = [json.loads((sweep / str(job) / "result.json").read_text()) for job in range(4)]
    for result in found:
        metrics, known = result["metrics"], result["environment"]["ceilings"]
        name = {"cold": "storage", "warm": "mapping"}[result["config"]["cache"]["state"]]
        assert result["effective"]["ceiling"] == name
        assert metrics["load/ceiling_gb_per_s"] == known[f"{name}_gb_per_s"] > 0
        assert metrics["load/ceiling_share"] == pytest.approx(
            metrics["load/gb_per_s"] / metrics["load/ceiling_gb_per_s"]
        )
    assert "of ceiling" in (sweep / "summary.md").read_text() and "%" in shown.stdout
    assert (sweep / CEILINGS_FILE).exists()
    warm_up = json.loads((sweep / "warm-up" / "result.json").read_text())
    assert "load/ceiling_share" not in warm_up["metrics"]


@pytest.mark.slow
def test_single_runs_measure_on_request_and_sweeps_stop_on_request(ladezeit: Run, tmp_path: Path) -> None:
    """Seconds of measuring are nothing in a sweep and a lot in a single run."""
    for arguments, has in (((), False), (("ceilings=on", "loading.dtype=float32"), True)):
        shown = ladezeit(*BASE, "cache=warm", f"hydra.run.dir={tmp_path}/{has}", *arguments)
        assert shown.returncode == 0, shown.stdout + shown.stderr
        result = json.loads((tmp_path / str(has) / "result.json").read_text())
        assert ("load/ceiling_share" in result["metrics"]) == has
        assert result["effective"].get("ceiling") == ("memcpy" if has else None)
    shown = ladezeit("-m", *BASE, "sample=0,1", "ceilings=off", f"hydra.sweep.dir={tmp_path}/off")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "of ceiling" not in shown.stdout and not (tmp_path / "off" / CEILINGS_FILE).exists()


@pytest.mark.gpu
def test_on_a_gpu_the_link_is_measured_too(shards: list[Path]) -> None:
    """Page-locked memory is what a GPU reads at the link's rate."""
    found = measure_apart("cuda:0", shards)
    check(found, (*ON_CPU, *ON_GPU))
    for state in (CacheState.cold, CacheState.warm):
        assert binding_ceiling(found, state, "cuda:0", True) is not None
