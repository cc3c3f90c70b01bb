"""The engine `streamed` on real files and the real page cache: every byte is the file's, however it was brought in."""

import gc
import json
import os
import resource
import struct
import threading
import time
from pathlib import Path
from typing import Any

import host_runtime
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from streamed_for_tests import DEVICES, EXTENT, WAYS, assert_same, bits, checkpoint_of, descriptors, load, random_shard

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.safetensors_header import DTYPE_BITS
from ladezeit.config import CacheState
from ladezeit.errors import CheckpointError, ConfigError, LadezeitError, LoadError
from ladezeit.loading.base import LoadRequest
from ladezeit.loading.streamed import memory, plan
from ladezeit.loading.streamed.arguments import Reading, StreamedLoading
from ladezeit.loading.streamed.engine import StreamedEngine
from ladezeit.loading.streamed.layout import Segment
from ladezeit.loading.streamed.memory import ShardFile, dtype_of
from ladezeit.loading.streamed.plan import Extent, ReadMethod
from ladezeit.loading.streamed.readers import in_background
from ladezeit.system import page_cache
from ladezeit.timing.clock import Clock


def write(path: Path, layout: list[tuple[str, tuple[int, ...]]], pad: int = 0, seed: int = 0) -> Path:
    """Write a safetensors file by hand, so that offsets need not be aligned; `pad` blanks shift all of them."""
    header: dict[str, Any] = {}
    position = 0
    for number, (dtype, shape) in enumerate(layout):
        size = int(np.prod(shape, dtype=np.int64)) * DTYPE_BITS[dtype] // 8
        header[f"t{number}"] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode() + b" " * pad
    data = np.random.default_rng(seed).integers(0, 2, position, dtype=np.uint8)  # also valid as bool
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data.tobytes())
    return path


@WAYS
@pytest.mark.parametrize("state", ["cold", "warm"])
@pytest.mark.parametrize("threads", [1, 8])
def test_the_weights_are_the_files(way: str, state: str, threads: int, own_tiny: Checkpoint) -> None:
    """A user gets the weights that safetensors would give, cold or warm, with one thread or many."""
    wanted = {name: tensor.clone() for shard in own_tiny.shards for name, tensor in load_file(shard).items()}
    gc.collect()
    page_cache.drop_pages(own_tiny.shards) if state == "cold" else page_cache.warm_pages(own_tiny.shards)
    loaded = load(own_tiny, way, threads=threads)
    assert_same(loaded.tensors, wanted)
    assert not loaded.borrowed
    effective = loaded.effective
    assert effective["threads"] == threads
    assert effective["direct_io_refused"] is False
    if state == "cold":
        assert effective["bytes_read_direct"] > 0.9 * own_tiny.weight_bytes
    else:  # a system that is short of memory takes single pages back at any time
        assert effective["bytes_read_direct"] < 0.1 * own_tiny.weight_bytes
        assert (effective["bytes_mapped"] if way == "in place" else effective["bytes_read_buffered"]) > 0


layouts = st.lists(
    st.tuples(
        st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "BOOL", "F64", "F8_E4M3", "I32"]),
        st.one_of(
            st.just(()),
            st.tuples(st.integers(0, 70_000)),
            st.tuples(st.integers(0, 40), st.integers(0, 300)),
        ),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    layout=layouts,
    pad=st.integers(0, 9),
    threads=st.sampled_from([1, 3]),
    way=st.sampled_from(list(DEVICES)),
    cold=st.booleans(),
    extent_pages=st.integers(1, 16),
)
def test_any_layout_is_loaded_bit_for_bit(  # noqa: PLR0917 (hypothesis passes by keyword)
    layout: Any, pad: int, threads: int, way: str, cold: bool, extent_pages: int, tmp_path: Path
) -> None:
    """Scalars, empty tensors, mixed dtypes and offsets that no dtype is aligned to come out as they were written."""
    path = write(tmp_path / "any.safetensors", layout, pad)
    if cold:
        page_cache.drop_pages([path])
    checkpoint = checkpoint_of_header_only(path)
    loaded = load(checkpoint, way, threads=threads, extent_bytes=4096 * extent_pages)
    raw = path.read_bytes()
    assert loaded.tensors.keys() == {entry.name for entry in checkpoint.tensors}
    for entry in checkpoint.tensors:
        tensor = loaded.tensors[entry.name]
        assert tuple(tensor.shape) == entry.shape
        assert tensor.dtype == dtype_of(entry)
        assert tensor.data_ptr() % tensor.element_size() == 0
        assert bits(tensor) == raw[entry.begin : entry.end]


def checkpoint_of_header_only(path: Path) -> Checkpoint:
    from ladezeit.checkpoint.safetensors_header import read_header

    return Checkpoint(path.parent, (path,), read_header(path).tensors, {}, "safetensors", "", False, 0, 0, "float32")


@WAYS
def test_a_checkpoint_without_a_byte_is_loaded(way: str, tmp_path: Path) -> None:
    """Tensors of no elements are there with shape and dtype, though nothing is read."""
    save_file({"none": torch.empty(0, 3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    loaded = load(checkpoint_of(tmp_path / "model.safetensors"), way)
    assert loaded.tensors["none"].shape == (0, 3) and loaded.tensors["none"].dtype == torch.bfloat16


@WAYS
def test_thousands_of_small_tensors_over_several_shards(way: str, tmp_path: Path) -> None:
    """A mixture of experts with many small tensors in several files is loaded whole."""
    shards = []
    for number in range(3):
        tensors = {f"s{number}.{n}": torch.full((n % 7, 3), float(n), dtype=torch.bfloat16) for n in range(2000)}
        shards.append(tmp_path / f"model-{number}.safetensors")
        save_file(tensors, shards[-1])
    wanted = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert_same(load(checkpoint_of(*shards), way).tensors, wanted)


@WAYS
def test_a_half_cached_file_is_read_both_ways(way: str, shard: Path) -> None:
    """Of a half warm file the warm half is taken from memory, the cold half read past the cache; `effective` tells."""
    checkpoint = checkpoint_of(shard)
    wanted = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    gc.collect()
    page_cache.drop_pages([shard])
    with shard.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(20 * EXTENT)
    loaded = load(checkpoint, way)
    assert_same(loaded.tensors, wanted)
    taken, other = (
        ("bytes_mapped", "bytes_read_buffered") if way == "in place" else ("bytes_read_buffered", "bytes_mapped")
    )
    assert loaded.effective[taken] == pytest.approx(20 * EXTENT, abs=2 * EXTENT)
    assert loaded.effective["bytes_read_direct"] == pytest.approx(20 * EXTENT, abs=2 * EXTENT)
    assert loaded.effective[other] == 0
    before = shard.read_bytes()
    for tensor in loaded.tensors.values():
        tensor.zero_()
    assert shard.read_bytes() == before


def test_a_file_cached_in_many_scattered_pieces_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second extent warm, or more pieces than may be mapped: the weights are the file's all the same."""
    shard = random_shard(tmp_path / "model.safetensors", 41 * EXTENT)
    checkpoint = checkpoint_of(shard)
    wanted = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    monkeypatch.setattr(
        memory, "resident_ranges", lambda fd, path, ranges: ([n % 2 == 1 for n in range(len(ranges))], "test")
    )
    loaded = load(checkpoint)
    assert_same(loaded.tensors, wanted)
    assert loaded.effective["bytes_mapped"] > 0
    assert loaded.effective["direct_io_refused"] is False
    monkeypatch.setattr(plan, "_MOST_PIECES", 10)
    loaded = load(checkpoint)
    assert_same(loaded.tensors, wanted)
    assert loaded.effective["bytes_mapped"] == 0
    assert loaded.effective["bytes_read_buffered"] > 0


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_a_file_of_somebody_else_is_read_by_residency_too(
    state: str, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared cache that others own is mapped where it is warm and read past the cache where it is cold."""
    checkpoint = checkpoint_of(shard)
    wanted = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    gc.collect()
    page_cache.drop_pages([shard]) if state == "cold" else page_cache.warm_pages([shard])
    with monkeypatch.context() as stranger:
        stranger.setattr(os, "access", lambda path, mode: False)
        stranger.setattr(os, "geteuid", lambda: -1)
        loaded = load(checkpoint)
    assert_same(loaded.tensors, wanted)
    assert loaded.effective["residency_by"] == "reading"
    way = "bytes_read_direct" if state == "cold" else "bytes_mapped"
    assert loaded.effective[way] > 0.9 * shard.stat().st_size


def test_writing_to_weights_leaves_the_file_alone(shard: Path) -> None:
    """Who trains or edits a model that was mapped from a warm file does not change the checkpoint."""
    before = shard.read_bytes()
    loaded = load(checkpoint_of(shard))
    assert loaded.effective["bytes_mapped"] > 0
    for tensor in loaded.tensors.values():
        tensor.zero_()
    assert shard.read_bytes() == before


@WAYS
def test_a_file_truncated_after_inspection_is_an_error(way: str, shard: Path) -> None:
    """A file that got shorter is refused by name instead of killing the process with SIGBUS."""
    checkpoint = checkpoint_of(shard)
    os.truncate(shard, shard.stat().st_size - 5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes, and had"):
        load(checkpoint, way)


@WAYS
def test_a_file_that_shrinks_during_the_load_is_an_error(way: str, shard: Path) -> None:
    """The error names the file and the offset whose bytes are gone; nothing half read is handed out."""
    checkpoint = checkpoint_of(shard)
    page_cache.drop_pages([shard])

    if way == "native":  # whose progress is told by the clock
        host_runtime.offset("hold").value = 0

    def shrink(done: int, total: int, seconds: float) -> None:
        os.truncate(shard, EXTENT)
        if way == "native":
            host_runtime.offset("hold").value = -1

    with pytest.raises(LoadError, match=r"model\.safetensors: the bytes at offset \d+ cannot be read: .*shorter"):
        load(checkpoint, way, progress=shrink, threads=1)


def test_a_file_that_is_rewritten_during_the_load_is_an_error(shard: Path) -> None:
    """A checkpoint whose writer was still at work is not handed out as a mixture of old and new."""
    checkpoint = checkpoint_of(shard)
    page_cache.drop_pages([shard])

    def rewrite(done: int, total: int, seconds: float) -> None:
        os.utime(shard, (1, 1))

    with pytest.raises(LoadError, match="was changed while it was read"):
        load(checkpoint, progress=rewrite)


@WAYS
def test_a_disk_error_in_a_thread_stops_all_and_leaves_nothing(
    way: str, shard: Path, io_error: None, tmp_path: Path
) -> None:
    """An I/O error is the caller's exception, with file and offset; no thread and no descriptor stays behind."""
    checkpoint = checkpoint_of(shard)
    page_cache.drop_pages([shard])
    open_before, threads_before = descriptors(), threading.active_count()
    with pytest.raises(LoadError, match=r"model\.safetensors: .* offset \d+ .*Input/output error"):
        load(checkpoint, way, threads=8)
    in_background.join()
    assert threading.active_count() == threads_before
    assert descriptors() == open_before


@WAYS
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_no_descriptor_stays_open_while_the_weights_live(way: str, state: str, shard: Path) -> None:
    """A server that holds many models does not run out of descriptors, however they were loaded."""
    checkpoint = checkpoint_of(shard)
    page_cache.drop_pages([shard]) if state == "cold" else page_cache.warm_pages([shard])
    before = descriptors()
    kept = [load(checkpoint, way) for _ in range(3)]
    assert descriptors() == before
    del kept


@pytest.mark.parametrize("when", ["open", "read"])
def test_where_direct_io_is_refused_the_load_goes_on_and_says_so(
    when: str, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without direct I/O the load works, and the result tells that it was buffered and why."""
    checkpoint = checkpoint_of(shard)
    wanted = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    monkeypatch.setattr(memory, "resident_ranges", lambda fd, path, ranges: ([False] * len(ranges), "unknown"))
    honest_open, honest_preadv = os.open, os.preadv
    refused: set[int] = set()

    def refusing_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT and when == "open":
            raise OSError(22, "Invalid argument")
        descriptor = honest_open(path, flags, *rest, **named)
        if flags & os.O_DIRECT:
            refused.add(descriptor)
        return descriptor

    def refusing_preadv(descriptor: int, *rest: Any) -> int:
        if descriptor in refused:
            raise OSError(22, "Invalid argument")
        return honest_preadv(descriptor, *rest)

    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "preadv", refusing_preadv)
    loaded = load(checkpoint)
    assert_same(loaded.tensors, wanted)
    assert loaded.effective["direct_io_refused"] is True
    assert "Invalid argument" in loaded.effective["direct_io_refused_reason"]
    assert loaded.effective["bytes_read_direct"] == 0
    assert loaded.effective["bytes_read_buffered"] > 39 * EXTENT


@WAYS
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at /dev/shm")
def test_a_checkpoint_in_memory_is_loaded(way: str) -> None:
    """A checkpoint on tmpfs, which is all cache and knows no disk, loads like any other."""
    path = Path(f"/dev/shm/ladezeit-test-{os.getpid()}.safetensors")
    try:
        random_shard(path)
        wanted = {name: tensor.clone() for name, tensor in load_file(path).items()}
        assert_same(load(checkpoint_of(path), way).tensors, wanted)
    finally:
        path.unlink()


@WAYS
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_progress_reaches_the_total(way: str, state: str, shard: Path) -> None:
    """Who shows a bar sees it rise and end at 100 %."""
    checkpoint = checkpoint_of(shard)
    page_cache.drop_pages([shard]) if state == "cold" else page_cache.warm_pages([shard])
    seen: list[tuple[int, int, float]] = []
    load(checkpoint, way, progress=lambda done, total, seconds: seen.append((done, total, seconds)), threads=4)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] >= 40 * EXTENT


def test_the_ring_stays_within_its_budget(shard: Path) -> None:
    """Pinned host memory does not grow with the model: the ring is never larger than `ring_bytes`."""
    loaded = load(checkpoint_of(shard), "ring", threads=4, ring_bytes=8 * 3 * 4096, extent_bytes=2**20)
    assert loaded.effective["ring_bytes"] == 8 * 3 * 4096
    assert_same(loaded.tensors, load_file(shard))


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"extent_bytes": 5000}, {"extent_bytes": 0}, {"ring_bytes": 4096}])
def test_arguments_out_of_range_are_refused_by_name(wrong: dict[str, int], shard: Path) -> None:
    """A wrong number is refused before the load, with the key to change."""
    with pytest.raises(ConfigError, match=f"loading.{next(iter(wrong))}="):
        load(checkpoint_of(shard), **wrong)


def test_a_missing_shard_is_named(shard: Path) -> None:
    """A shard that vanished is an error with its name, not a traceback."""
    checkpoint = checkpoint_of(shard)
    shard.unlink()
    with pytest.raises(LadezeitError, match=r"model\.safetensors cannot be opened"):
        load(checkpoint)


def test_the_phases_are_planning_and_reading(shard: Path) -> None:
    """The timeline of a run shows how long planning took and how long reading."""
    clock = Clock(time.monotonic_ns())
    loading = StreamedLoading(name="streamed")
    with StreamedEngine().open(LoadRequest(checkpoint_of(shard), loading, "cpu", shard.parent), clock):
        pass
    assert [phase.path for phase in clock.phases] == ["load/plan", "load/allocate", "load/read"]


def test_what_is_not_cast_is_cut_at_any_byte() -> None:
    """A weight that begins where its dtype cannot, in a file with others that are cast, keeps its last bytes."""
    piece = Segment(begin=90, end=190, arena=0, offset=640, source=torch.float32, target=torch.float32)
    assert piece.clip_range(128, 256) == Segment(128, 190, 0, 678, torch.float32, torch.float32)
    cast = Segment(begin=92, end=192, arena=0, offset=640, source=torch.float32, target=torch.float16)
    assert cast.clip_range(128, 256) == Segment(128, 192, 0, 658, torch.float32, torch.float16)


@pytest.mark.parametrize("first_bytes", [64, 24], ids=["all alike", "each its own"])
def test_weights_for_a_gpu_lie_where_its_kernels_want_them(first_bytes: int, tmp_path: Path) -> None:
    """A file's tensors begin where its header ends, at 8 mod 16 as often as not; kernels refuse those."""
    tensors = {"a": torch.arange(first_bytes, dtype=torch.uint8), "b": torch.arange(100_000, dtype=torch.uint8)}
    path = tmp_path / "model.safetensors"
    for padding in range(16):
        save_file(tensors, path, {"note": "x" * padding})
        checkpoint = checkpoint_of(path)
        if checkpoint.tensors[0].begin % 16 == 8:
            break
    assert checkpoint.tensors[0].begin % 16 == 8
    loaded = load(checkpoint, "ring")
    assert_same(loaded.tensors, tensors)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in loaded.tensors.values())


def test_a_symlinked_shard_is_read(shard: Path, tmp_path: Path) -> None:
    """The hub's cache holds shards as symbolic links."""
    link = tmp_path / "link.safetensors"
    link.symlink_to(shard)
    assert_same(load(checkpoint_of(link)).tensors, load_file(shard))


def test_closing_twice_is_harmless(shard: Path) -> None:
    """An error while cleaning up would hide the error that mattered."""
    file = ShardFile(shard, shard.stat().st_size)
    file.close()
    file.close()
    assert file.descriptor == -1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_on_a_gpu_the_weights_are_the_files_and_memory_is_theirs(state: str, tmp_path: Path) -> None:
    """On a GPU every bit is the file's, and no device memory besides the weights is taken."""
    path = random_shard(tmp_path / "model.safetensors", size=256 * 2**20)
    wanted = {name: tensor.clone() for name, tensor in load_file(path).items()}
    gc.collect()
    page_cache.drop_pages([path]) if state == "cold" else page_cache.warm_pages([path])
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    request = LoadRequest(checkpoint_of_header_only(path), StreamedLoading(name="streamed"), "cuda:0", tmp_path)
    with StreamedEngine().open(request, Clock(time.monotonic_ns())) as loaded:
        assert all(tensor.device == torch.device("cuda:0") for tensor in loaded.tensors.values())
        assert torch.cuda.max_memory_allocated() - before <= path.stat().st_size + 4 * 2**20
        assert 0 < loaded.effective["pinned_bytes"] <= loaded.effective["ring_bytes"]
        if state == "cold":
            assert loaded.effective["bytes_read_direct"] > 0.9 * path.stat().st_size
        assert all(tensor.data_ptr() % 16 == 0 for tensor in loaded.tensors.values())
        assert_same({name: tensor.cpu() for name, tensor in loaded.tensors.items()}, wanted)


def test_scattered_reads_go_on_after_short_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system returns fewer bytes than asked, as on some network file systems, none is lost or doubled."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(300_000))
    raw, whole = path.read_bytes(), os.preadv

    def short(descriptor: int, buffers: list[Any], offset: int) -> int:
        first = memoryview(buffers[0])
        return whole(descriptor, [first[: max(1, len(first) // 2)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    begins = [5, 100, 50_000, 50_010, 299_000]
    sizes = [95, 40_000, 7, 200_000, 1000]
    memories = [bytearray(size) for size in sizes]
    places = [(begin, memoryview(memory)) for begin, memory in zip(begins, memories, strict=True)]
    with ShardFile(path, 300_000) as file:
        file.read_scattered(Extent(0, 0, 300_000, ReadMethod.buffered), places)
    assert memories == [raw[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]


@pytest.mark.parametrize("state", ["cold", "warm", "half"])
def test_no_page_is_left_to_be_faulted_in(state: str, tmp_path: Path) -> None:
    """The load is done when it ends: reading every weight afterwards waits for nothing, so nothing is touched twice."""
    shard = random_shard(tmp_path / "model.safetensors", 400 * EXTENT)
    page_cache.set_state([shard], CacheState(state))
    loaded = load(checkpoint_of(shard))
    assert loaded.touched
    before = resource.getrusage(resource.RUSAGE_SELF)
    for tensor in loaded.tensors.values():
        bytes(memoryview(tensor.view(torch.uint8).numpy())[:: os.sysconf("SC_PAGESIZE")])
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_majflt == before.ru_majflt
    assert after.ru_minflt - before.ru_minflt < 100  # of 6,400 pages


@WAYS
@pytest.mark.parametrize("reading", ["direct", "buffered", "mapped"])
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_one_way_to_read_is_kept_to(way: str, reading: str, state: str, own_tiny: Checkpoint) -> None:
    """Who compares ways to read gets the one that was asked for, whatever is in memory."""
    wanted = {name: tensor.clone() for shard in own_tiny.shards for name, tensor in load_file(shard).items()}
    page_cache.drop_pages(own_tiny.shards) if state == "cold" else page_cache.warm_pages(own_tiny.shards)
    loaded = load(own_tiny, way, reading=Reading[reading])
    assert_same(loaded.tensors, wanted)
    used = {key for key in ("bytes_read_direct", "bytes_read_buffered", "bytes_mapped") if loaded.effective[key]}
    mapped = "bytes_mapped" if way == "in place" else "bytes_read_buffered"
    assert used == {{"direct": "bytes_read_direct", "buffered": "bytes_read_buffered", "mapped": mapped}[reading]}
