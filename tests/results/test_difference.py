"""The sentence that names why one method loads longer than another, or that nobody can tell."""

import random

import pytest
from example_results import not_ok, result
from hypothesis import given, settings
from hypothesis import strategies as st

from ladezeit.errors import LadezeitError
from ladezeit.result import Phase, Result, Status
from ladezeit.results.difference import REST, UNATTRIBUTED, compare


def samples(loading: str, n: int = 5, cache: str = "warm") -> list[Result]:
    return [result(loading, cache, sample) for sample in range(n)]


def timed(loading: str, totals: list[float]) -> list[Result]:
    """Return samples whose loads took exactly `totals`, all of it reading."""
    made = []
    for total in totals:
        measured = result(loading)
        measured.phases = [Phase("load/read", 0.0, total, total), Phase("load", 0.0, total, 0.0)]
        measured.metrics["load/total_s"] = total
        made.append(measured)
    return made


def test_the_origin_case_is_explained_in_one_sentence() -> None:
    """What the whole tool is for: the settings were optimal, the manager's walk over all modules was the cost."""
    found = compare(samples("legacy_manager"), samples("cuda_fp16"))
    assert found.sentence == (
        "legacy_manager takes 170.6 s longer than cuda_fp16 (warm, n = 5 and 5, p = 0.008): "
        "170.5 s of it (100 %) is load/module_walk."
    )
    assert found.distinguishable is True
    assert found.phases[0].path == "load/module_walk"


def test_the_order_of_the_sides_does_not_matter() -> None:
    """The slower one is found, not told."""
    one, other = samples("legacy_manager"), samples("cuda_fp16")
    assert compare(one, other) == compare(other, one)


def test_gains_and_losses_are_both_named() -> None:
    """A share of more than 100 % explains nothing: what was lost here was partly saved there."""
    found = compare(samples("cpu_then_move"), samples("cuda_fp16"))
    assert found.sentence.endswith(": 6.153 s more in load/move, 1.517 s less in load/read.")


def test_too_few_samples_are_called_too_few() -> None:
    """Three samples a side cannot reach any level, however far apart they lie; the phases are named all the same."""
    found = compare(samples("legacy_manager", 3), samples("cuda_fp16", 3))
    assert found.p_value is None
    assert found.distinguishable is None
    assert "load/module_walk" in found.sentence
    assert found.sentence.endswith("Too few samples to tell it from chance: n = 3 and 3, each side needs 4.")


def test_what_chance_explains_is_not_called_a_difference() -> None:
    """A tenth of a second between overlapping samples is no winner."""
    found = compare(timed("cuda_fp16", [1.0, 1.2, 1.4, 1.6, 1.8]), timed("transformers", [1.1, 1.3, 1.5, 1.7, 1.75]))
    assert found.distinguishable is False
    assert "transformers and cuda_fp16 are not distinguishable (warm, n = 5 and 5)" in found.sentence
    assert "exact Mann-Whitney p = 0.84" in found.sentence


def test_work_that_only_one_side_does_is_named_even_where_it_is_lost_in_the_noise() -> None:
    """The manager's walk costs what it costs, also where the whole load varies by more than that."""
    before = timed("legacy_manager", [1.0, 1.2, 1.4, 1.6, 1.8])
    after = timed("cuda_fp16", [1.1, 1.3, 1.5, 1.7, 1.75])
    for measured in before:
        measured.phases.append(Phase("load/module_walk", 0.5, 0.005, 0.005))
    found = compare(before, after)
    assert "not distinguishable" in found.sentence
    assert "Only legacy_manager has" in found.sentence and "load/module_walk (0.005 s)" in found.sentence


def test_the_probability_is_the_exact_one() -> None:
    """With four and four wholly apart there are 2 of 70 orders as extreme: 0.0286; ties are counted as they are."""
    apart = compare(timed("a", [1, 2, 3, 4]), timed("b", [5, 6, 7, 8]))
    assert apart.p_value == pytest.approx(2 / 70)
    tied = compare(timed("a", [1, 1, 1, 1]), timed("b", [1, 1, 1, 1]))
    assert tied.p_value == 1.0
    assert "not distinguishable" in tied.sentence


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000))
def test_phase_differences_add_up_to_the_whole(n: int, m: int, seed: int) -> None:
    """No part of a difference is lost between the phases: medians do not add up, so what is left has its own line."""
    noise = random.Random(seed)
    one = [result("legacy_manager", sample=i, factor=noise.uniform(0.5, 2)) for i in range(n)]
    other = [result("cuda_fp16", sample=i, factor=noise.uniform(0.5, 2)) for i in range(m)]
    found = compare(one, other)
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
    found = compare(blind, samples("cuda_fp16"))
    assert found.phases[0].path == UNATTRIBUTED
    assert "more in load/unattributed" in found.sentence


def test_only_proven_samples_are_compared() -> None:
    """A load that ended with wrong weights was fast for the wrong reason."""
    wrong = not_ok(Status.wrong, "12 weights differ", "cuda_fp16")
    wrong.metrics["load/total_s"] = 0.1
    assert compare([*samples("cuda_fp16"), wrong], samples("legacy_manager")).n == (5, 5)
    with pytest.raises(LadezeitError, match="1 samples but none that is ok"):
        compare([wrong], samples("legacy_manager"))


def test_what_is_not_comparable_is_refused() -> None:
    """A cold load is slower than a warm one for a reason that is no property of the method."""
    with pytest.raises(LadezeitError, match=r"differ in cache \(cold, warm\)"):
        compare(samples("cuda_fp16", cache="cold"), samples("legacy_manager"))
