"""The statistics against brute force and scipy: a decision is only worth what these figures promise."""

import itertools
import math
import statistics as standard

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from ladezeit.analysis.statistics import (
    Spread,
    adjust_holm,
    estimate_ratio,
    find_outliers,
    largest_significant_u,
    mann_whitney,
    mann_whitney_against,
    median_interval,
    signed_rank,
)

times = st.floats(0.01, 1000, allow_nan=False)
samples = st.lists(times, min_size=1, max_size=8)
tied = st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=6)


@given(samples, samples)
def test_mann_whitney_without_ties_is_scipys_exact_test(one: list[float], other: list[float]) -> None:
    assume(len({*one, *other}) == len(one) + len(other))
    exact = stats.mannwhitneyu(one, other, alternative="two-sided", method="exact").pvalue
    assert mann_whitney(one, other) == pytest.approx(exact, abs=1e-12)


@given(tied, tied)
def test_mann_whitney_with_ties_is_the_permutation_test(one: list[float], other: list[float]) -> None:
    """Brute force: every way to deal the pooled values into two hands, two-sided by doubling the smaller tail."""
    pooled = stats.rankdata([*one, *other])
    seen = pooled[: len(one)].sum()
    sums = [sum(hand) for hand in itertools.combinations(pooled, len(one))]
    below = sum(total <= seen + 1e-9 for total in sums) / len(sums)
    above = sum(total >= seen - 1e-9 for total in sums) / len(sums)
    assert mann_whitney(one, other) == pytest.approx(min(1.0, 2 * min(below, above)))


@given(st.lists(st.lists(st.integers(1, 12).map(float), min_size=1, max_size=6), min_size=1, max_size=5), samples)
def test_many_at_once_is_one_by_one(groups: list[list[float]], reference: list[float]) -> None:
    assert mann_whitney_against(groups, reference) == pytest.approx([mann_whitney(own, reference) for own in groups])


def test_what_can_be_reached_at_all() -> None:
    """The figures that the documentation names: 3 against 3 cannot reach 0.05, 5 against 5 reaches 0.0079."""
    assert mann_whitney([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1)
    assert mann_whitney([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    assert mann_whitney([1.0] * 5, [1.0] * 5) == 1.0
    assert largest_significant_u(3, 3) == -1 and largest_significant_u(5, 5) == 2


def test_large_samples_go_on_without_a_break() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=60).tolist(), (rng.normal(size=60) + 0.4).tolist()
    exact = stats.mannwhitneyu(one, other, method="exact").pvalue
    assert mann_whitney(one, other) == pytest.approx(exact, rel=0.05)
    assert mann_whitney_against([one], other) == [mann_whitney(one, other)]
    assert abs(largest_significant_u(51, 51) - largest_significant_u(50, 50)) < 60


@given(st.integers(1, 60))
def test_the_interval_of_the_median_has_the_coverage_it_claims(n: int) -> None:
    """Order statistics miss the median when too many values fall on one side: a binomial tail on each."""
    found = median_interval([float(value) for value in range(n)])
    cut = int(found.low)
    assert found.high == n - 1 - cut
    assert found.coverage == pytest.approx(max(0.0, 1 - 2 * stats.binom.cdf(cut, n, 0.5)))
    if found.coverage < 0.95:
        assert cut == 0
    elif cut + 1 < (n + 1) // 2:
        assert 1 - 2 * stats.binom.cdf(cut + 1, n, 0.5) < 0.95


def test_five_samples_never_claim_95_percent() -> None:
    assert median_interval([5.0, 1.0, 4.0, 2.0, 3.0]).coverage == 0.9375


@given(samples, samples)
def test_the_ratio_agrees_with_the_test(one: list[float], other: list[float]) -> None:
    """A ratio whose interval leaves out 1 is one that the test finds, and the other way round."""
    pooled = sorted([*one, *other])
    assume(all(b - a > 1e-6 * b for a, b in itertools.pairwise(pooled)))
    found = estimate_ratio(one, other)
    assert found is not None
    assert found.interval.low <= found.estimate <= found.interval.high
    brute = standard.median(math.log(a) - math.log(b) for a in one for b in other)
    assert found.estimate == pytest.approx(math.exp(brute))
    if found.interval.coverage >= 0.95:
        left_out = found.interval.low > 1 or found.interval.high < 1
        assert left_out == (mann_whitney(one, other) < 0.05)


def test_the_ratios_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(4000):
        found = estimate_ratio((1.3 * rng.lognormal(0, 0.2, 5)).tolist(), rng.lognormal(0, 0.2, 5).tolist())
        assert found is not None
        hits += found.interval.low <= 1.3 <= found.interval.high
    assert hits / 4000 == pytest.approx(1 - 2 * 4 / 252, abs=0.009)


def test_a_ratio_needs_positive_values() -> None:
    assert estimate_ratio([0.0, 1.0], [1.0, 2.0]) is None and estimate_ratio([], [1.0]) is None


@given(st.lists(st.tuples(times, times), min_size=6, max_size=10))
def test_the_blocked_test_is_wilcoxons(pairs: list[tuple[float, float]]) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    differences = np.log(one) - np.log(other)
    assume(len({abs(d) for d in differences}) == len(pairs) and 0 not in differences)
    exact = stats.wilcoxon(differences, method="exact").pvalue
    assert signed_rank(one, other) == pytest.approx(exact)


def test_the_blocked_test_says_nothing_below_six_blocks() -> None:
    assert signed_rank([1.0] * 5, [2.0] * 5) is None
    assert signed_rank([1.0, 2, 3, 4, 5, 6], [2.0, 3, 4, 5, 6, 7]) == pytest.approx(2 / 64)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_is_scipys_step_down(p_values: list[float]) -> None:
    adjusted = adjust_holm(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    expected = 0.0
    for position, index in enumerate(order):
        expected = max(expected, min(1.0, (len(order) - position) * p_values[index]))
        assert adjusted[index] == pytest.approx(expected)


def test_outliers_are_flagged_and_still_counted() -> None:
    values = [1.0, 1.01, 0.99, 1.02, 0.98, 9.0]
    spread = Spread.from_values(values)
    assert spread is not None and spread.outliers == (9.0,) and spread.n == 6 and spread.largest == 9.0
    assert find_outliers([1.0, 1.0, 1.0, 1.0, 2.0]) == (2.0,)
    assert find_outliers([1.0] * 5) == () and find_outliers([1.0, 9.0]) == ()


def test_no_p95_below_twenty_samples() -> None:
    few, many = Spread.from_values([1.0] * 19), Spread.from_values([float(v) for v in range(20)])
    assert few is not None and few.p95 is None
    assert many is not None and many.p95 == pytest.approx(18.05)
    assert Spread.from_values([]) is None
