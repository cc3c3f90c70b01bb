"""Memory that a model took is there again after it; what is not is said, with who has it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from known_models import Known, says

import ladezeit
from ladezeit import ModelManager
from ladezeit.config import TransformersLoading
from ladezeit.errors import LadezeitError, LoadError, OutOfMemoryError
from ladezeit.serving.events import LoadStarted
from ladezeit.serving.model_cache import BudgetError
from ladezeit.serving.protocols import Bytes

Config = Callable[..., dict[str, Any]]


def cycles(manager: ModelManager, name: str, count: int) -> tuple[list[int], list[int]]:
    """Load and unload so often; return the resident bytes and the open descriptors after each."""
    resident, descriptors = [], []
    for _ in range(count):
        manager.get(name)
        report = manager.unload(name)
        assert report.was_loaded
        assert not report.still_held
        resident.append(psutil.Process().memory_info().rss)
        descriptors.append(len(list(Path("/proc/self/fd").iterdir())))
    return resident, descriptors


def assert_steady(resident: list[int], descriptors: list[int]) -> None:
    """Nothing grows after the third: less than 1 % of memory, and no descriptor."""
    after = resident[2:]
    assert max(after[-3:]) < 1.01 * max(after[:3]), f"{after[0]} bytes became {after[-1]}"
    assert descriptors[-1] <= descriptors[2]


def test_two_hundred_cycles_leak_nothing(origin_config: Config) -> None:
    """A service that swaps models for months does not grow."""
    assert_steady(*cycles(ModelManager(origin_config("ape")), "ape", 200))


@pytest.mark.slow
def test_twenty_cycles_of_a_real_model_leak_nothing() -> None:
    manager = ModelManager({"smollm2-135m": {"loading": {"device_map": "cpu"}}})
    assert_steady(*cycles(manager, "smollm2-135m", 20))


@pytest.mark.gpu
def test_two_hundred_cycles_leak_nothing_on_a_gpu(origin_config: Config) -> None:
    import torch

    manager = ModelManager(origin_config("ape", device="cuda"))
    cycles(manager, "ape", 3)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert_steady(*cycles(manager, "ape", 200))
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) <= before


def test_unloading_gives_back_what_the_model_took() -> None:
    """Measured, not assumed: a cast model is memory of the process, and the process has that much less afterwards."""
    manager = ModelManager({"tiny": {"loading": {"device_map": "cpu", "torch_dtype": "float32"}}})
    manager.get("tiny")
    report = manager.unload("tiny")
    assert report.held.host > 5 * 2**20
    assert report.freed.host > 0.9 * report.held.host
    assert "is unloaded" in str(report)
    assert not manager.unload("tiny").was_loaded


def test_a_load_that_finds_no_memory_is_an_error_that_says_so() -> None:
    """A service catches one class for it, whichever library had asked for the memory, and reads what to do."""
    full = TransformersLoading(name="full", engine="engines_for_tests:FillsTheHost", device_map="device")
    with pytest.raises(
        OutOfMemoryError, match=r"memory ran out while tiny was loaded by full to cpu: .*smaller"
    ) as said:
        ladezeit.load("tiny", device="cpu", loading=full)
    assert "can't allocate memory" in str(said.value.__cause__)
    assert isinstance(said.value, LoadError)


def test_a_model_that_somebody_holds_is_said_to_be_held(known: dict[str, Known], origin_config: Config) -> None:
    """Its memory stays on the account until the last tensor is gone, so that the budget is one of real memory."""
    manager = ModelManager(origin_config("ape"))
    weight = manager.get("ape").model.model.layers[0].mlp.up_proj.weight
    report = manager.unload("ape")
    assert report.still_held
    assert "something holds its tensors" in str(report)
    assert manager.status().still_held == ["ape"]
    assert manager.status().charged == Bytes(host=known["ape"].bytes + _rotary_bytes())
    del weight
    assert manager.status().charged == Bytes()
    assert manager.status().still_held == []


def _rotary_bytes() -> int:
    """Two buffers of 16 float32 that no checkpoint holds."""
    return 2 * 16 * 4


def test_what_somebody_holds_is_not_evicted_for_nothing(known: dict[str, Known], origin_config: Config) -> None:
    """Dropping it would free nothing: it stays usable, and who is refused is told of it."""
    manager = ModelManager(origin_config("ape", "bee"), host_budget=known["ape"].bytes + 2**20, wait_s=0.6)
    held = manager.get("ape")
    with pytest.raises(BudgetError, match="ape is held by who got it"):
        manager.get("bee")
    assert manager.get("ape") is held
    del held
    assert says(manager.get("bee").model) == known["bee"].tokens


def test_a_model_that_can_never_fit_is_refused_before_it_is_read(origin_config: Config) -> None:
    """By the headers of the checkpoint: nothing else is unloaded for it, and no load begins."""
    begun: list[str] = []
    config = origin_config("ape", "bee")
    config["bee"]["loading"] = {"device_map": "cpu", "dtype": "float32"}
    manager = ModelManager(
        config,
        host_budget="8MiB",
        listeners=[lambda event: begun.append(event.model) if isinstance(event, LoadStarted) else None],
    )
    manager.get("ape")
    with pytest.raises(
        BudgetError, match=r"bee needs 1\d\.\d MiB of host memory, the host_budget is 8\.0 MiB: nothing"
    ):
        manager.get("bee")
    assert begun == ["ape"]
    assert manager.status().models["ape"].state == "loaded"
    with pytest.raises(BudgetError, match="ape and bee needs"):
        manager.preload()


def test_the_least_recently_used_model_goes_first(known: dict[str, Known], origin_config: Config) -> None:
    manager = ModelManager(origin_config(), host_budget=2 * known["ape"].bytes + 2**20)
    for name in ("ape", "bee", "ape", "cat"):
        manager.get(name)
    states = {name: each.state for name, each in manager.status().models.items()}
    assert states == {"ape": "loaded", "bee": "not loaded", "cat": "loaded"}


@pytest.mark.parametrize(("room_for", "old_during_the_load"), [(2, "loaded"), (1, "not loaded")])
def test_a_swap_loads_beside_where_it_fits(
    room_for: int, old_during_the_load: str, known: dict[str, Known], origin_config: Config
) -> None:
    """The old model answers until the new one is proven, if there is room for both."""
    seen: list[str] = []
    manager = ModelManager(
        origin_config("ape", "bee"),
        host_budget=room_for * known["ape"].bytes + 2**20,
        listeners=[lambda event: seen.append(manager.status().models["ape"].state)],
    )
    manager.get("ape")
    seen.clear()
    assert says(manager.swap("ape", "bee").model) == known["bee"].tokens
    states = {name: each.state for name, each in manager.status().models.items()}
    assert states == {"ape": "not loaded", "bee": "loaded"}
    assert seen[0] == old_during_the_load


def test_a_swap_to_a_broken_model_keeps_the_old_one(
    known: dict[str, Known], origin_config: Config, tmp_path: Any
) -> None:
    config = {**origin_config("ape"), "broken": {"path": str(tmp_path), "loading": {"device_map": "cpu"}}}
    manager = ModelManager(config)
    manager.get("ape")
    with pytest.raises(Exception, match=r"config\.json"):
        manager.swap("ape", "broken")
    assert manager.status().models["ape"].state == "loaded"


class Full:
    """A machine with a megabyte left."""

    def free_memory(self) -> Bytes:
        return Bytes(gpu=2**20, host=2**20)


def test_without_a_budget_the_machine_s_free_memory_is_the_limit(origin_config: Config) -> None:
    """Refused at once and before it is read: nobody holds anything that could be waited for."""
    manager = ModelManager(origin_config("ape"), machine=Full())
    with pytest.raises(BudgetError, match=r"ape needs 5\.5 MiB.*free memory of this machine.*nothing was read"):
        manager.get("ape")
    assert ModelManager(origin_config("ape")).get("ape").verification.passed


def test_a_closed_manager_has_given_everything_back(origin_config: Config) -> None:
    with ModelManager(origin_config("ape", "bee")) as manager:
        manager.preload()
    assert manager.status().charged == Bytes()
    with pytest.raises(LadezeitError, match="closed"):
        manager.get("ape")
