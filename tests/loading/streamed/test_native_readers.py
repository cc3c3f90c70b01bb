"""The ring without Python: every byte is right however late the device copies; every failure is the caller's error."""

import ctypes
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from host_runtime import variable
from safetensors.torch import load_file, save_file
from streamed_for_tests import EXTENT, assert_same, checkpoint_of, load

from ladezeit.errors import LoadError
from ladezeit.loading.streamed import native_readers
from ladezeit.loading.streamed.arguments import Readers
from ladezeit.loading.streamed.layout import Segment
from ladezeit.loading.streamed.native_readers import RUNTIME_FUNCTIONS
from ladezeit.loading.streamed.readers import in_background
from ladezeit.system import page_cache


@pytest.fixture(autouse=True)
def all_given_back() -> Iterator[None]:
    """Whatever becomes of a load, no memory stays registered and no event stays behind."""
    yield
    in_background.join()
    counts = {name: variable(name).value for name in ("registered", "allocated", "events")}
    assert counts == {"registered": 0, "allocated": 0, "events": 0}


@pytest.fixture
def setting() -> Iterator[Any]:
    """Sets numbers of the runtime for one test."""
    before: list[tuple[ctypes.c_int, int]] = []

    def put(name: str, value: int) -> None:
        before.append((variable(name), variable(name).value))
        variable(name).value = value

    yield put
    for number, value in reversed(before):
        number.value = value


@pytest.mark.parametrize("threads", [1, 3, 12])
def test_loads_one_after_the_other_have_every_byte(threads: int, tmp_path: Path) -> None:
    """Slots that are used hundreds of times by a device that copies as late as it may never carry another's bytes."""
    bits_ = torch.randint(0, 255, (3, 60 * EXTENT), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = {f"{part}.{n}": bits_[n, part::2].clone() for n in range(3) for part in (0, 1)}
    shards = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for number, shard in enumerate(shards):
        save_file({name: tensor for name, tensor in wanted.items() if name.endswith(f".{number}")}, shard)
    for state, slot in itertools.product(("warm", "cold"), (4096, EXTENT)):
        checkpoint = checkpoint_of(*shards)
        page_cache.drop_pages(shards) if state == "cold" else page_cache.warm_pages(shards)
        loaded = load(checkpoint, "native", threads=threads, extent_bytes=slot)
        assert_same(loaded.tensors, wanted)
        assert loaded.effective["readers"] == "native"
        read = loaded.effective["bytes_read_direct"] if state == "cold" else loaded.effective["bytes_read_buffered"]
        assert read >= 0.9 * sum(shard.stat().st_size for shard in shards)
        assert loaded.effective["pinned_bytes"] <= loaded.effective["ring_bytes"]
        assert loaded.effective["unpinned_after_load"] == loaded.effective["pinned_bytes"] > 0


@pytest.mark.parametrize("refused", [("refuse_register",), ("refuse_register", "refuse_alloc")])
def test_where_nothing_can_be_registered_the_weights_come_all_the_same(
    refused: tuple[str, ...], setting: Any, shard: Path
) -> None:
    """A sandbox that refuses to register memory gets the driver's own, or pageable copies, and the result says so."""
    for name in refused:
        setting(name, 1)
    loaded = load(checkpoint_of(shard), "native", threads=3)
    assert_same(loaded.tensors, load_file(shard))
    assert (loaded.effective["pinned_bytes"] > 0) is (len(refused) == 1)


@pytest.mark.parametrize("after", [0, 7])
def test_a_device_that_fails_ends_the_load_with_its_own_words(after: int, setting: Any, shard: Path) -> None:
    """An error of the GPU is the load's error, at the first copy and in the middle; nothing half read is handed out."""
    setting("fail_copy_after", after)
    with pytest.raises(LoadError, match="copying to the device failed: error 700 of the host"):
        load(checkpoint_of(shard), "native", threads=4)


def test_one_kind_of_readers_is_kept_to(shard: Path) -> None:
    """Who compares readers gets those that were asked for, or an error that says why not."""
    assert load(checkpoint_of(shard), "native", readers=Readers.native).effective["readers"] == "native"
    assert load(checkpoint_of(shard), "native", readers=Readers.python).effective["readers"] == "python"
    with pytest.raises(LoadError, match=r"readers=native cannot be had: .*Use loading\.readers=auto"):
        load(checkpoint_of(shard), "ring", readers=Readers.native)


def test_pieces_are_cut_where_extents_end() -> None:
    """A tensor that lies over several reads, and a read that holds several tensors, are copied piece by piece."""
    arena = torch.empty(4096, dtype=torch.uint8)
    view = native_readers.np.zeros(3, native_readers._EXTENT)
    view["begin"], view["end"] = [0, 100, 200], [100, 200, 260]
    kind = torch.uint8
    pieces = [
        Segment(10, 30, 0, 0, kind, kind),
        Segment(40, 230, 0, 512, kind, kind),
        Segment(230, 260, 0, 1024, kind, kind),
    ]
    made, first = native_readers._copies_of_pieces(view, pieces, {0: arena})
    base = arena.data_ptr()
    found = [(int(one["target"]) - base, int(one["source"]), int(one["size"])) for one in made]
    assert found == [(0, 10, 20), (512, 40, 60), (572, 0, 100), (672, 0, 30), (1024, 30, 30)]
    assert list(first) == [0, 2, 3, 5]


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older build left behind is never given lists that it would read otherwise."""
    assert native_readers.is_built()
    native_readers._library.cache_clear()
    monkeypatch.setattr(native_readers, "_VERSION", 0)
    assert not native_readers.is_built()
    monkeypatch.undo()
    native_readers._library.cache_clear()
    assert native_readers.is_built()


@pytest.mark.gpu
def test_the_runtime_that_torch_loaded_has_all_functions() -> None:
    """On a GPU machine the native readers find what they call."""
    torch.zeros(1, device="cuda")
    found = native_readers.cuda_functions()
    assert found is not None and len(found) == len(RUNTIME_FUNCTIONS) + 1 and all(found[:-1])
