import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ladezeit.loading.streamed.arguments import StreamedLoading
from ladezeit.runner import pipeline
from ladezeit.timing.clock import LOAD, Clock


def _nest(clock: Clock, tree: list, path: str = LOAD) -> None:
    for index, children in enumerate(tree):
        with clock.span(f"{path}/{index}"):
            _nest(clock, children, f"{path}/{index}")


trees = st.recursive(st.just([]), lambda inner: st.lists(inner, max_size=4), max_leaves=20)


@given(trees)
def test_own_times_of_all_phases_add_up_to_the_load(tree: list) -> None:
    """Users add the phase metrics up; whatever the nesting, the sum is the total, the rest included."""
    clock = Clock(time.monotonic_ns())
    with clock.span(LOAD):
        _nest(clock, tree)
    inside = [phase.self_s for phase in clock.phases]
    assert sum(inside) == pytest.approx(clock.duration_s(LOAD), abs=1e-6)
    assert all(own >= 0 for own in inside)


def test_a_phase_that_fails_is_still_in_the_record() -> None:
    """After an out-of-memory error the user sees how far the load came and how long that took."""
    clock = Clock(time.monotonic_ns())
    with pytest.raises(MemoryError), clock.span(LOAD), clock.span("load/read"):
        raise MemoryError
    assert [phase.path for phase in clock.phases] == ["load/read", LOAD]


def test_without_detail_the_load_is_one_phase() -> None:
    """`phases=off` must not look inside, or it could not show that looking costs nothing."""
    clock = Clock(time.monotonic_ns(), detail=False)
    with clock.span("import"), clock.span(LOAD), clock.span("load/read"):
        assert not clock.begin_step("load/assign")
    assert sorted(phase.path for phase in clock.phases) == ["import", LOAD]


def test_the_device_is_waited_for_at_the_end_of_each_span() -> None:
    """An asynchronous copy belongs to the phase that started it, not to whoever waits for it later."""
    waited: list[str] = []
    clock = Clock(time.monotonic_ns(), synchronize=waited.append)
    with clock.span(LOAD):
        with clock.span("load/read"):
            pass
        assert waited == ["load/read"]
    assert waited == ["load/read", LOAD]


@pytest.mark.gpu
def test_on_a_gpu_a_phase_waits_for_its_own_stream_and_the_load_for_all() -> None:
    """Looking at phases does not slow down an engine that copies in the background; the total leaves nothing out."""
    wait = pipeline.completion_waiter(StreamedLoading(name="streamed"))
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        torch.cuda._sleep(2 * 10**9)  # a second
    wait("load/plan")
    assert not side.query()
    wait(LOAD)
    assert side.query()


def test_progress_is_told_before_a_phase_starts() -> None:
    """The live line names what is going on now, not what is over."""
    told: list[str] = []
    clock = Clock(time.monotonic_ns(), notify=told.append)
    with clock.span(LOAD):
        assert told == [LOAD]
