"""Many threads, three models, room for two: each is right, none is loaded twice, and the budget holds."""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from known_models import Known, expected, says

from ladezeit import ModelManager
from ladezeit.errors import LadezeitError
from ladezeit.serving.events import Event, LoadFinished, LoadStarted, Unloaded
from ladezeit.serving.in_process import InProcessLoader
from ladezeit.serving.model_cache import BudgetError

Config = Callable[..., dict[str, Any]]
THREADS = 50


class Watched(InProcessLoader):
    """Loads as ever, and knows of each model that it loaded whether it is still in memory."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.loaded: list[tuple[Any, int]] = []
        self.loading: Counter[str] = Counter()
        self.most_at_once = 0

    def load_model(self, settings: Any) -> Any:
        self.loading[settings.name] += 1
        self.most_at_once = max(self.most_at_once, self.loading.total())
        try:
            loaded = super().load_model(settings)
        finally:
            self.loading[settings.name] -= 1
        size = sum(tensor.nbytes for tensor in loaded.model.state_dict().values())
        self.loaded.append((weakref.ref(loaded.model), size))
        return loaded

    def bytes_in_memory(self) -> int:
        return sum(size for model, size in list(self.loaded) if model() is not None)


def watched_manager(config: dict[str, Any], **arguments: Any) -> tuple[ModelManager, Watched]:
    loader = Watched(ModelManager(config).settings)
    return ModelManager(config, loader=loader, **arguments), loader


def in_threads(count: int, do: Callable[[int], None]) -> list[BaseException]:
    """Run `do` with a number each in `count` threads, all at once, and return what they raised."""
    raised: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            do(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=200)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    return raised


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_fifty_threads_share_three_models_in_the_room_of_two(
    device: str, known: dict[str, Known], origin_config: Config
) -> None:
    """Every answer is the asked model's; what is accounted and what is really in memory stay below the budget."""
    place = "host" if device == "cpu" else "gpu"
    right = {name: expected(model, device) for name, model in known.items()}
    events: list[Event] = []
    largest = max(model.bytes for model in known.values())
    budget = 2 * largest + largest // 2
    room: dict[str, Any] = {f"{place}_budget": budget}
    manager, loader = watched_manager(origin_config(device=device), **room, wait_s=150, listeners=[events.append])
    names = list(known)
    most = Counter[str]()
    answered = Counter[str]()
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            most["charged"] = max(most["charged"], getattr(manager.status().charged, place))
            most["in memory"] = max(most["in memory"], loader.bytes_in_memory())
            time.sleep(0.002)

    def ask(number: int) -> None:
        for turn in range(2):
            name = names[(number + turn) % len(names)]
            with manager.use(name) as loaded:
                assert says(loaded.model) == right[name], f"not the answer of {name}"
                answered[name] += 1

    sampler = threading.Thread(target=sample)
    sampler.start()
    raised = in_threads(THREADS, ask)
    done.set()
    sampler.join()
    assert raised == []
    assert answered.total() == 2 * THREADS
    assert 0 < most["charged"] <= budget
    assert 0 < most["in memory"] <= budget
    assert loader.most_at_once == 1
    check_one_at_a_time(events)
    status = manager.status()
    assert {each.state for each in status.models.values()} == {"loaded", "not loaded"}
    assert all(each.uses == 0 for each in status.models.values())


def check_one_at_a_time(events: list[Event]) -> None:
    """A model is loaded again only after it was unloaded."""
    here: set[str] = set()
    for event in sorted(events, key=lambda event: event.at_ns):
        if isinstance(event, LoadFinished):
            assert event.model not in here, f"{event.model} was loaded twice"
            here.add(event.model)
        elif isinstance(event, Unloaded):
            here.discard(event.model)
    assert any(isinstance(event, Unloaded) for event in events)


def test_all_who_ask_at_once_wait_for_one_load(origin_config: Config) -> None:
    events: list[Event] = []
    manager = ModelManager(origin_config("ape"), listeners=[events.append])
    got: list[Any] = []
    assert in_threads(THREADS, lambda number: got.append(manager.get("ape"))) == []
    assert len({id(loaded) for loaded in got}) == 1
    assert sum(isinstance(event, LoadStarted) for event in events) == 1


def test_a_load_that_fails_fails_for_all_who_wait_and_is_tried_again(tmp_path: Any, known: dict[str, Known]) -> None:
    """An error is an answer for those who waited, not a state that sticks."""
    folder = tmp_path / "late"
    manager = ModelManager({"late": {"path": str(folder), "loading": {"device_map": "cpu"}}})
    raised = in_threads(8, lambda number: manager.use("late").__enter__())
    assert len(raised) == 8
    assert all(isinstance(error, LadezeitError) for error in raised)
    assert manager.status().models["late"].state == "failed"
    assert str(folder) in (manager.status().models["late"].error or "")
    folder.symlink_to(known["bee"].folder)
    with manager.use("late") as loaded:
        assert says(loaded.model) == known["bee"].tokens
    assert manager.status().models["late"].error is None


def test_a_model_in_use_is_not_evicted_and_the_load_waits(known: dict[str, Known], origin_config: Config) -> None:
    manager = ModelManager(origin_config("ape", "bee"), host_budget=known["ape"].bytes + 2**20)
    done: list[str] = []
    other = threading.Thread(target=lambda: done.append(says(manager.get("bee").model) and "bee"))
    with manager.use("ape") as loaded:
        other.start()
        other.join(timeout=1)
        assert not done, "bee was loaded although ape was in use"
        assert says(loaded.model) == known["ape"].tokens
    other.join(timeout=100)
    assert done == ["bee"]
    assert manager.status().models["ape"].state == "not loaded"


def test_a_use_that_has_ended_holds_nothing(known: dict[str, Known], origin_config: Config) -> None:
    """The variable of a `with` block lives on; the model must not live on by it, and using it is an error."""
    manager = ModelManager(origin_config("ape", "bee"), host_budget=known["ape"].bytes + 2**20, wait_s=0.5)
    with manager.use("ape") as used:
        assert says(used.model) == known["ape"].tokens
    with pytest.raises(LadezeitError, match="the use of ape has ended"):
        assert used.model
    assert says(manager.get("bee").model) == known["bee"].tokens


def test_what_is_in_the_way_for_too_long_is_named(known: dict[str, Known], origin_config: Config) -> None:
    """A wait without an end is never the answer, not even where a thread waits for itself."""
    manager = ModelManager(origin_config("ape", "bee"), host_budget=known["ape"].bytes + 2**20, wait_s=0.3)
    with manager.use("ape"), pytest.raises(BudgetError, match=r"bee needs .*In the way: ape is in use 1 times"):
        manager.get("bee")
    assert says(manager.get("bee").model) == known["bee"].tokens


def test_busy_models_make_room_for_one_that_waits(known: dict[str, Known], origin_config: Config) -> None:
    """Threads that use one model without a pause, overlapping, cannot starve who asks for another."""
    manager = ModelManager(origin_config("ape", "bee"), host_budget=known["ape"].bytes + 2**20, wait_s=100)
    done = threading.Event()

    def ask(number: int) -> None:
        if number == 0:
            time.sleep(0.5)
            assert says(manager.get("bee").model) == known["bee"].tokens
            done.set()
        while not done.is_set():
            with manager.use("ape") as loaded:
                assert says(loaded.model) == known["ape"].tokens

    assert in_threads(6, ask) == []


def test_a_thread_may_use_what_it_uses_already(known: dict[str, Known], origin_config: Config) -> None:
    """While another load waits for the room of a model, its user may take it a second time and does not lock itself."""
    manager = ModelManager(origin_config("ape", "bee"), host_budget=known["ape"].bytes + 2**20, wait_s=100)
    with manager.use("ape"):
        other = threading.Thread(target=manager.get, args=("bee",))
        other.start()
        time.sleep(0.3)
        with manager.use("ape") as again:
            assert says(again.model) == known["ape"].tokens
    other.join(timeout=100)
    assert manager.status().models["bee"].state == "loaded"


def test_an_interrupted_load_interrupts_nobody_else(known: dict[str, Known], origin_config: Config) -> None:
    """Ctrl-C reaches one thread: those that wait for its load are told, and the next call loads."""

    class Interrupted(InProcessLoader):
        def load_model(self, settings: Any) -> Any:
            if not begun.is_set():
                begun.set()
                time.sleep(0.5)
                raise KeyboardInterrupt
            return super().load_model(settings)

    begun = threading.Event()
    config = origin_config("ape")
    manager = ModelManager(config, loader=Interrupted(ModelManager(config).settings))

    def ask(number: int) -> None:
        if number:
            begun.wait()
        manager.get("ape")

    raised = sorted(type(error).__name__ for error in in_threads(3, ask))
    assert raised == ["KeyboardInterrupt", "LoadError", "LoadError"]
    assert manager.status().charged.host == 0
    assert says(manager.get("ape").model) == known["ape"].tokens
