"""The garbage collector stays out of a load, and comes back whatever happens."""

import gc
import threading
from pathlib import Path
from typing import Any

import pytest

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.errors import LoadError
from ladezeit.loading.base import LoadRequest
from ladezeit.loading.build_model import StateDictEngine
from ladezeit.loading.streamed.arguments import StreamedLoading
from ladezeit.loading.streamed.engine import StreamedEngine
from ladezeit.system.gc_pause import pause_gc
from ladezeit.timing.clock import Clock


def test_a_load_pauses_it_by_itself(own_tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to ask: while tensors are read the collector is off, and after a failed load it is on again."""
    seen: list[bool] = []

    def failing(*arguments: Any, **options: Any) -> Any:
        seen.append(gc.isenabled())
        raise LoadError("no such model")

    monkeypatch.setattr(StreamedEngine, "open", failing)
    request = LoadRequest(own_tiny, StreamedLoading(name="streamed"), "cpu", Path())
    with pytest.raises(LoadError, match="no such model"):
        StateDictEngine(StreamedEngine()).load(request, Clock(0))
    assert seen == [False]
    assert gc.isenabled()


def test_a_program_that_has_it_off_keeps_it_off() -> None:
    """A service that collects by itself, at moments of its own, is not overruled."""
    gc.disable()
    try:
        with pause_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_last_of_several_loads_turns_it_on() -> None:
    """Two loads at once: the first that is done leaves the other's pause alone."""
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with pause_gc():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with pause_gc():
        thread.start()
        assert inside.wait(60)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()
