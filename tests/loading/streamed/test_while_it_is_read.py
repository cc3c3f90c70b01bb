"""What a caller can do with weights that are still on their way, and what happens when they never arrive."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from streamed_for_tests import DEVICES, EXTENT, WAYS, assert_same, checkpoint_of, descriptors
from transformers import core_model_loading

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.errors import LoadError
from ladezeit.loading.base import LazyStateDict, LoadedTensors, LoadRequest
from ladezeit.loading.build_model import StateDictEngine
from ladezeit.loading.streamed.arguments import Reading, StreamedLoading
from ladezeit.loading.streamed.engine import StreamedEngine
from ladezeit.loading.streamed.readers import in_background
from ladezeit.system import page_cache
from ladezeit.timing.clock import LOAD, Clock


@contextmanager
def opened(checkpoint: Checkpoint, way: str) -> Iterator[LoadedTensors]:
    engine = StreamedEngine(DEVICES[way])
    loading = StreamedLoading(name="streamed", extent_bytes=EXTENT, reading=Reading.direct)
    with engine.open(LoadRequest(checkpoint, loading, "cpu", checkpoint.folder), Clock(time.monotonic_ns())) as loaded:
        yield loaded


@WAYS
def test_a_model_can_be_built_while_its_weights_arrive(way: str, shard: Path, gate: threading.Event) -> None:
    """Names, shapes and dtypes are there at once; whoever looks at values waits for them."""
    wanted = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    with opened(checkpoint_of(shard), way) as loaded:
        early = {name: (tensor.shape, tensor.dtype) for name, tensor in loaded.by_name.items()}
        assert early == {name: (tensor.shape, tensor.dtype) for name, tensor in wanted.items()}
        assert loaded.effective == {}
        threading.Timer(0.2, gate.set).start()
        assert_same({name: awaited[...] for name, awaited in LazyStateDict(loaded).items()}, wanted)
        loaded.wait()
        assert loaded.effective["whole_read_s"] > 0


@pytest.fixture
def a_before_b(tmp_path: Path) -> Path:
    path = tmp_path / "ordered.safetensors"
    data = torch.randint(0, 255, (40 * EXTENT,), dtype=torch.uint8)
    save_file({"a": data[: 10 * EXTENT].clone(), "b": data[10 * EXTENT :].clone()}, path)
    return path


def test_a_weight_is_there_before_those_after_it(a_before_b: Path, second_half: threading.Event) -> None:
    """A model takes its first layers while its last ones are read: after the last byte little is left to do."""
    wanted = {name: tensor.clone() for name, tensor in load_file(a_before_b).items()}
    with opened(checkpoint_of(a_before_b), "in place") as loaded:
        awaited = LazyStateDict(loaded)
        assert torch.equal(awaited["a"][...], wanted["a"])
        assert not second_half.is_set() and loaded.effective == {}
        threading.Timer(0.1, second_half.set).start()
        assert torch.equal(awaited["b"][...], wanted["b"])
        assert second_half.is_set()


def test_waiting_for_weights_is_one_phase(a_before_b: Path, second_half: threading.Event) -> None:
    """Hundreds of weights that are waited for are one line in the timeline, with the time of all of them."""
    engine, clock = StreamedEngine(), Clock(time.monotonic_ns())
    loading = StreamedLoading(name="streamed", extent_bytes=EXTENT, reading=Reading.direct)
    checkpoint = checkpoint_of(a_before_b)
    with clock.span(LOAD), engine.open(LoadRequest(checkpoint, loading, "cpu", a_before_b.parent), clock) as loaded:
        threading.Timer(0.1, second_half.set).start()
        with clock.span("load/assign"):
            for name in loaded.by_name:
                loaded.get_tensor(name)
    within = next(phase for phase in clock.phases if phase.path == "load/read")
    assign = next(phase for phase in clock.phases if phase.path == "load/assign")
    assert 0.05 < within.duration_s <= assign.duration_s
    assert assign.self_s == pytest.approx(assign.duration_s - within.duration_s, abs=1e-6)


def test_an_error_reaches_those_who_wait_for_a_weight_that_never_comes(a_before_b: Path, io_error: None) -> None:
    """What is there may be taken; what is not ends the load with the disk's error."""
    with pytest.raises(LoadError, match="were not read"), opened(checkpoint_of(a_before_b), "in place") as loaded:
        loaded.get_tensor("a")
        with pytest.raises(LoadError, match="Input/output error"):
            loaded.get_tensor("b")


@WAYS
def test_a_reading_that_failed_stays_failed(way: str, shard: Path, io_error: None) -> None:
    """Whoever passes over the error does not get what the memory held before for weights."""
    whole, first = pytest.raises(LoadError, match="were not read"), pytest.raises(LoadError, match="Input/output error")
    with whole, opened(checkpoint_of(shard), way) as loaded, first:
        LazyStateDict(loaded)["a"][...]


@WAYS
def test_whoever_leaves_early_leaves_no_reader(way: str, shard: Path, gate: threading.Event) -> None:
    """A model that cannot be built ends the reading: nothing writes into memory that nobody holds."""
    threads_before, open_before = threading.active_count(), descriptors()
    with pytest.raises(KeyError, match="no such model"), opened(checkpoint_of(shard), way):
        threading.Timer(0.2, gate.set).start()
        raise KeyError("no such model")
    gate.wait()
    time.sleep(0.05)  # the timer's own thread
    assert (threading.active_count(), descriptors()) == (threads_before, open_before)


def test_the_library_maps_all_names_before_a_byte_is_there(
    own_tiny: Checkpoint, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `from_pretrained` does besides taking weights costs a load nothing: it is done while they are read."""
    honest, queued = core_model_loading.spawn_materialize, []

    def counted(*arguments: Any, **options: Any) -> Any:
        queued.append(1)
        if len(queued) == len(own_tiny.tensors):
            assert not gate.is_set()
            gate.set()
        return honest(*arguments, **options)

    monkeypatch.setattr(core_model_loading, "spawn_materialize", counted)
    page_cache.drop_pages(own_tiny.shards)
    model = assembled(own_tiny)
    wanted = {name: tensor for shard in own_tiny.shards for name, tensor in load_file(shard).items()}
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_disk_that_fails_is_the_error_of_the_load(own_tiny: Checkpoint, io_error: None) -> None:
    """A weight that never arrives ends the load with file and offset, not with a tale of missing weights."""
    page_cache.drop_pages(own_tiny.shards)
    with pytest.raises(LoadError, match=r"\.safetensors: .* offset \d+ .*Input/output error"):
        assembled(own_tiny)


def test_a_library_that_takes_weights_in_threads_gets_them_too(own_tiny: Checkpoint) -> None:
    """Releases that know no switch for their threads wait in those, and every thread gets its weight."""
    wanted = {name: tensor.clone() for shard in own_tiny.shards for name, tensor in load_file(shard).items()}
    page_cache.drop_pages(own_tiny.shards)
    with opened(own_tiny, "in place") as loaded, ThreadPoolExecutor(4) as pool:
        found = dict(pool.map(lambda pair: (pair[0], pair[1][...]), LazyStateDict(loaded).items()))
    assert_same(found, wanted)


def assembled(checkpoint: Checkpoint) -> Any:
    loading = StreamedLoading(name="streamed", extent_bytes=EXTENT, reading=Reading.direct)
    request = LoadRequest(checkpoint, loading, "cpu", checkpoint.folder)
    return StateDictEngine(StreamedEngine()).load(request, Clock(time.monotonic_ns())).model


@WAYS
def test_after_an_interrupt_no_thread_writes(way: str, shard: Path, gate: threading.Event) -> None:
    """Ctrl-C during a load is raised when nothing is read any more: the memory may belong to somebody else then."""
    threads_before = threading.active_count()
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    threading.Timer(0.6, gate.set).start()
    with pytest.raises(KeyboardInterrupt), opened(checkpoint_of(shard), way) as loaded:
        loaded.wait()
    assert gate.is_set()
    in_background.join()
    time.sleep(0.05)  # the timer's own thread
    assert threading.active_count() == threads_before
