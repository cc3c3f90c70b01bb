"""Which GPUs a placement needs and holds: what is not there is said first, what is used is held against others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ladezeit.config import TransformersLoading
from ladezeit.config.device_map import device_map
from ladezeit.config.rules import check_placement
from ladezeit.errors import CombinationError, ConfigError, NotRunnableError
from ladezeit.loading import preflight
from ladezeit.loading.engines.tensor_parallel import TensorParallelLoading
from ladezeit.loading.preflight import check_on_machine, devices_used
from ladezeit.sweep.session import Session
from ladezeit.system.device_lock import lock_path
from ladezeit.system.gpus import ResolvedDevice
from ladezeit.system.nvml import Gpu

GPUS = [Gpu(index, f"GPU-{index}-{os.getpid()}", "a GPU", 2**34, "1", None, None) for index in range(3)]
FIRST = ResolvedDevice("cuda:0", GPUS[0], None)
SPLIT = {"model.layers": "cuda:0", "lm_head": 2}


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's answer of a machine with three GPUs; nothing is run on them."""
    monkeypatch.setattr(preflight, "cuda_devices", lambda: GPUS)


def loading(**arguments: Any) -> TransformersLoading:
    return TransformersLoading(name="mine", **arguments)


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("asked", "used"),
    [
        (loading(device_map="device"), [0]),
        (loading(device_map="cuda:1"), [0, 1]),
        (loading(device_map="auto"), [0, 1, 2]),
        (loading(device_map="balanced", max_memory={"device": "1GiB"}), [0]),
        (loading(device_map="balanced", max_memory={"device": "1GiB", "1": "1GiB"}), [0, 1]),
        (loading(device_map=SPLIT), [0, 2]),
        (TensorParallelLoading(name="tp", ranks=2), [0, 1]),
    ],
)
def test_a_sample_holds_every_gpu_it_may_be_on(asked: Any, used: list[int]) -> None:
    """A second sweep on a GPU that the first one only spills over to would spoil both."""
    check_on_machine(asked, FIRST)
    assert [device.name for device in devices_used(asked, FIRST)] == [f"cuda:{index}" for index in used]
    assert devices_used(asked, ResolvedDevice("cpu", None, None)) == [ResolvedDevice("cpu", None, None)]


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    "asked",
    [
        loading(device_map={"": "cuda:3"}),
        loading(device_map={**SPLIT, "lm_head": 7}),
        loading(device_map="sequential", max_memory={"5": "1GiB"}),
        TensorParallelLoading(name="tp", ranks=4),
    ],
)
def test_a_gpu_that_is_not_there_is_said_before_anything_starts(asked: Any) -> None:
    with pytest.raises(NotRunnableError, match=r"needs .*cuda:[3-7].* found cuda:0 \(a GPU\), cuda:1"):
        check_on_machine(asked, FIRST)


@pytest.mark.usefixtures("three_gpus")
def test_offload_is_looked_for_again_when_the_device_is_known() -> None:
    """With device=auto a mapping to `cpu` is right on a CPU and an unasked offload on a GPU."""
    asked = loading(device_map={"model": "device", "lm_head": "cpu"})
    check_placement(asked, "auto")
    with pytest.raises(CombinationError, match="disable_cpu_offload"):
        check_on_machine(asked, FIRST)


@pytest.mark.parametrize(
    "device_map",
    [
        "cuda:x",
        "cuda1",
        "",
        {},
        {"lm_head": "auto"},
        {"lm_head": None},
        {"": "cpu", "lm_head": "disk"},
        [0, 1],
        1.5,
        -1,
    ],
)
def test_a_word_that_means_nothing_is_refused(device_map: Any) -> None:
    with pytest.raises(ConfigError, match=r"loading\.device_map"):
        check_placement(loading(device_map=device_map, disable_cpu_offload=False), "cuda:0")


@pytest.mark.parametrize("size", ["", "lots", "-1GiB", "nan", "inf", "10 apples", "%"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match=r"loading\.max_memory has the size"):
        check_placement(loading(device_map="auto", max_memory={"device": size}), "cuda:0")


def test_gpus_by_number_are_numbers_for_the_library() -> None:
    """From a command line they come as text, which torch takes for the name of a device."""
    asked = loading(device_map={"model": "1", "lm_head": 0, "norm": "device"})
    assert device_map(asked, "cuda:2") == {"model": 1, "lm_head": 0, "norm": "cuda:2"}


def test_several_devices_are_held_and_given_back_in_one_order() -> None:
    """Two processes that ask for the same GPUs in different order must not wait for each other for ever."""
    session = Session()
    taken: list[str] = []

    @contextmanager
    def hold(device: ResolvedDevice, against: Any) -> Iterator[None]:
        taken.append(device.name)
        yield
        taken.append(f"-{device.name}")

    session.hold_device = hold  # type: ignore[method-assign, assignment]
    devices = [ResolvedDevice(f"cuda:{gpu.index}", gpu, None) for gpu in reversed(GPUS)]
    with session.hold_all([*devices, devices[0]], "samples"):
        assert taken == ["cuda:0", "cuda:1", "cuda:2"]
    assert taken[3:] == ["-cuda:2", "-cuda:1", "-cuda:0"]
    assert len({lock_path(device) for device in devices}) == 3
    session.close()
