"""The phases that make one method load longer than another."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from example_results import not_ok, result
from ladezeit.analysis.attribution import REST, UNATTRIBUTED, compare_phases
from ladezeit.errors import LadezeitError
from ladezeit.results.records import Result, Status


def samples(loading: str, n: int = 5, cache: str = "warm") -> list[Result]:
    return [result(loading, cache, sample) for sample in range(n)]


def test_the_order_of_the_sides_does_not_matter() -> None:
    """The slower one is found, not told."""
    one, other = samples("legacy_manager"), samples("cuda_fp16")
    assert compare_phases(one, other) == compare_phases(other, one)


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000))
def test_phase_differences_add_up_to_the_whole(n: int, m: int, seed: int) -> None:
    """No part of a difference is lost between the phases: medians do not add up, so what is left has its own line."""
    noise = random.Random(seed)
    one = [result("legacy_manager", sample=i, factor=noise.uniform(0.5, 2)) for i in range(n)]
    other = [result("cuda_fp16", sample=i, factor=noise.uniform(0.5, 2)) for i in range(m)]
    found = compare_phases(one, other)
    assert sum(phase.difference_s for phase in found.phases) == pytest.approx(found.total_s, abs=1e-9)
    assert found.total_s >= 0
    assert found.phases[-1].path == REST
    assert UNATTRIBUTED in [phase.path for phase in found.phases]


def test_samples_without_phases_are_compared_as_wholes() -> None:
    """With `phases=false` nothing inside the load was looked at: the difference is there, its cause is not."""
    blind = samples("cpu_then_move")
    for measured in blind:
        measured.phases = []
        measured.metrics["load/unattributed_s"] = measured.metrics["load/total_s"]
    found = compare_phases(blind, samples("cuda_fp16"))
    assert found.phases[0].path == UNATTRIBUTED


def test_only_proven_samples_are_compared() -> None:
    """A load that ended with wrong weights was fast for the wrong reason."""
    wrong = not_ok(Status.wrong, "12 weights differ", "cuda_fp16")
    wrong.metrics["load/total_s"] = 0.1
    proven = compare_phases(samples("cuda_fp16"), samples("legacy_manager"))
    assert compare_phases([*samples("cuda_fp16"), wrong], samples("legacy_manager")) == proven
    with pytest.raises(LadezeitError, match="1 samples but none that is ok"):
        compare_phases([wrong], samples("legacy_manager"))


def test_what_is_not_comparable_is_refused() -> None:
    """A cold load is slower than a warm one for a reason that is no property of the method."""
    with pytest.raises(LadezeitError, match=r"differ in cache \(cold, warm\)"):
        compare_phases(samples("cuda_fp16", cache="cold"), samples("legacy_manager"))
