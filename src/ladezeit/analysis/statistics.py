"""What few values can tell: spreads, intervals and tests that keep their promise at n = 5, whatever the distribution.

The one primary test is the exact two-sided Mann-Whitney test, adjusted by Holm's method over all comparisons of a
family. Samples are measured in shuffled blocks, so drift widens both sides alike: that costs the test power and never
makes it find what is not there. The blocked test (`signed_rank`) does not pay for drift, but cannot reach 0.05 below
six blocks: it is given beside the primary test and never decides.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

#: A probability of chance below this counts as a difference; intervals promise one less it.
LEVEL = 0.05

#: Below this many samples there is no winner: with 4 and 4 only complete separation reaches the level.
LEAST_TO_RANK = 5

#: Below this many samples a 95th percentile is little else than the maximum.
LEAST_FOR_P95 = 20

#: Modified z-score above which a value is flagged (Iglewicz and Hoaglin, 1993), and its two scale factors.
_OUTLIER_SCORE = 3.5
_MAD_SCALE = 1.4826
_MEAN_SCALE = 1.2533

#: Exact distributions are computed up to this product of the two counts; the normal approximation takes over above.
_MOST_EXACT = 2_500

#: A question counts as settled by a number of samples that would settle it in this share of the sweeps.
ENOUGH = 0.8

#: More samples than this are not proposed: a difference that needs them is too small to matter to a person.
MOST_SAMPLES = 100

_COUNTS = (5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40, 50, 65, 80, MOST_SAMPLES)
_TRIALS = 400
_SEED = 20260301

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A range from `low` to `high` with the probability that it covers the true value.

    `coverage` is what the order statistics really give: at n = 5 the widest interval of a median has 0.9375.
    """

    low: float
    high: float
    coverage: float


@dataclass(frozen=True)
class Spread:
    """What is said of the values of one point, in their own unit; `p95` is None below 20 values.

    `outliers` are values far from the median; they are flagged and take part in everything all the same.
    """

    n: int
    median: float
    mad: float
    least: float
    largest: float
    interval: Interval
    outliers: tuple[float, ...]
    p95: float | None

    @classmethod
    def from_values(cls, values: Sequence[float]) -> "Spread | None":
        """Return the spread of `values`, or None where there are none."""
        if not values:
            return None
        median = statistics.median(values)
        return cls(
            n=len(values),
            median=median,
            mad=statistics.median(abs(value - median) for value in values),
            least=min(values),
            largest=max(values),
            interval=median_interval(values),
            outliers=find_outliers(values),
            p95=float(np.quantile(values, 0.95)) if len(values) >= LEAST_FOR_P95 else None,
        )


def median_interval(values: Sequence[float]) -> Interval:
    """Return the narrowest symmetric interval of order statistics that covers the true median with 95 %.

    Where even the range does not reach that, the range is returned with its own, smaller coverage.
    """
    n = len(values)
    cut, missed = _median_cut(n)
    ordered = sorted(values)
    return Interval(ordered[cut], ordered[n - 1 - cut], 1 - missed)


@lru_cache
def _median_cut(n: int) -> tuple[int, float]:
    """Return how many values are cut from each end, and the probability that the rest misses the median."""
    tail, cut, missed = 0.0, 0, 0.0
    for count in range((n + 1) // 2):
        tail += math.comb(n, count) / 2**n
        if count and 2 * tail > LEVEL:
            break
        cut, missed = count, 2 * tail
    return cut, min(missed, 1.0)


def find_outliers(values: Sequence[float]) -> tuple[float, ...]:
    """Return the values whose modified z-score is above 3.5; none below five values."""
    if len(values) < LEAST_TO_RANK:
        return ()
    median = statistics.median(values)
    distances = [abs(value - median) for value in values]
    # Where more than half of the values are equal, the MAD is 0 and the mean distance takes its place.
    scale = _MAD_SCALE * statistics.median(distances) or _MEAN_SCALE * statistics.fmean(distances)
    return tuple(
        value for value, distance in zip(values, distances, strict=True) if distance > _OUTLIER_SCORE * scale > 0
    )


def mann_whitney(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the two-sided p of the Mann-Whitney test: exact, also with ties, up to 50 against 50 values.

    With ties it is the permutation distribution of the midranks at hand; above that size the normal approximation with
    the corrections for ties and continuity.
    """
    n, m = len(one), len(other)
    ranks = doubled_midranks([*one, *other])
    total = int(ranks[:n].sum())
    if n * m > _MOST_EXACT:
        from scipy import stats

        return float(stats.mannwhitneyu(one, other, alternative="two-sided", method="asymptotic").pvalue)
    below, above = _rank_sum_tails(tuple(np.sort(ranks).tolist()), n, total)
    return min(1.0, 2 * min(below, above))


def mann_whitney_against(groups: Sequence[Sequence[float]], reference: Sequence[float]) -> list[float]:
    """Return `mann_whitney` of each group against one `reference`; fast for hundreds of groups of equal size."""
    found: list[float] = [math.nan] * len(groups)
    by_size: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        by_size.setdefault(len(group), []).append(index)
    m = len(reference)
    for n, indices in by_size.items():
        values = np.array([groups[index] for index in indices], dtype=np.float64)
        pooled = np.sort(np.hstack([values, np.tile(np.asarray(reference, dtype=np.float64), (len(indices), 1))]))
        tied = (np.diff(pooled) == 0).any(axis=1) | (n * m > _MOST_EXACT)
        larger = (values[:, :, None] > np.asarray(reference)).sum(axis=(1, 2))
        for index, u, by_hand in zip(indices, np.minimum(larger, n * m - larger).tolist(), tied, strict=True):
            # U counts what is larger without ties alone; with them the test has a distribution of its own.
            exact = mann_whitney(groups[index], reference) if by_hand else 2 * float(_u_tails(n, m)[u])
            found[index] = min(1.0, exact)
    return found


def doubled_midranks(values: Sequence[float]) -> NDArray[np.int64]:
    """Return twice the rank of each value, equal values sharing their mean rank: whole numbers, shape as `values`."""
    array = np.asarray(values, dtype=np.float64)
    ordered = np.sort(array)
    ranks: NDArray[np.int64] = ordered.searchsorted(array, "left") + ordered.searchsorted(array, "right") + 1
    return ranks


@lru_cache(maxsize=4096)
def _rank_sum_tails(ranks: tuple[int, ...], n: int, total: int) -> tuple[float, float]:
    """Return the probabilities that `n` of the `compute_ranks`, drawn at random, sum up to at most and to at least
    `total`.
    """
    chances = _rank_sum_chances(ranks, n)
    return float(chances[: total + 1].sum()), float(chances[total:].sum())


@lru_cache(maxsize=512)
def _rank_sum_chances(ranks: tuple[int, ...], n: int) -> Values:
    """Return the probability of each sum of `n` of the `compute_ranks`; the index is the sum."""
    ways = np.zeros((n + 1, sum(sorted(ranks)[-n:]) + 1))
    ways[0, 0] = 1.0
    for seen, rank in enumerate(ranks):
        for count in range(min(seen, n - 1), -1, -1):
            ways[count + 1, rank:] += ways[count, : ways.shape[1] - rank]
    chances: Values = ways[n] / math.comb(len(ranks), n)
    return chances


def signed_rank(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the exact two-sided p of Wilcoxon's signed-rank test of pairs (the same block each), by their log ratios.

    None where there are fewer than six pairs, which cannot reach 0.05, or a value is not positive.
    """
    if len(one) != len(other) or len(one) <= LEAST_TO_RANK or min(*one, *other) <= 0:
        return None
    differences = np.log(np.asarray(one)) - np.log(np.asarray(other))
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    ranks = doubled_midranks([float(value) for value in np.abs(differences)])
    chances = np.ones(1)
    for rank in ranks:
        longer = np.zeros(len(chances) + rank)
        longer[: len(chances)] += chances / 2
        longer[rank:] += chances / 2
        chances = longer
    total = int(ranks[differences > 0].sum())
    return min(1.0, 2 * float(min(chances[: total + 1].sum(), chances[total:].sum())))


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values adjusted by Holm's method, in the order given: the chance of any false find in the family."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - position)))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Ratio:
    """How many times `one` the other is: Hodges and Lehmann's estimate and the interval that belongs to the test."""

    estimate: float
    interval: Interval


def estimate_ratio(one: Sequence[float], other: Sequence[float]) -> Ratio | None:
    """Return `one` divided by `other`, or None where a value is not positive.

    The estimate is the median of all pairwise ratios; the interval inverts the Mann-Whitney test (Moses), so that it
    leaves out 1 exactly where the test, unadjusted and without ties, is below 0.05. Where no interval reaches 95 %, the
    widest is given with the coverage it has (0.90 with 3 and 3 samples).
    """
    if not one or not other or min(*one, *other) <= 0:
        return None
    pairs = np.sort(np.subtract.outer(np.log(np.asarray(one)), np.log(np.asarray(other))), axis=None)
    cut = max(0, largest_significant_u(len(one), len(other)))
    low, middle, high = np.exp([pairs[cut], np.median(pairs), pairs[len(pairs) - 1 - cut]])
    coverage = 1 - min(1.0, 2 * _chance_of_at_most(len(one), len(other), cut))
    return Ratio(float(middle), Interval(float(low), float(high), coverage))


@lru_cache(maxsize=512)
def largest_significant_u(n: int, m: int, level: float = LEVEL) -> int:
    """Return the largest U of `n` and `m` values without ties whose two-sided p is below `level`; -1 where none is."""
    if n * m > _MOST_EXACT:
        middle, deviation = _normal_u(n, m)
        return math.floor(middle + statistics.NormalDist().inv_cdf(level / 2) * deviation - 0.5)
    return int(np.searchsorted(2 * _u_tails(n, m), level)) - 1


def _chance_of_at_most(n: int, m: int, u: int) -> float:
    if n * m > _MOST_EXACT:
        middle, deviation = _normal_u(n, m)
        return statistics.NormalDist(middle, deviation).cdf(u + 0.5)
    return float(_u_tails(n, m)[u])


def _normal_u(n: int, m: int) -> tuple[float, float]:
    return n * m / 2, math.sqrt(n * m * (n + m + 1) / 12)


@lru_cache(maxsize=512)
def _u_tails(n: int, m: int) -> Values:
    """Return the probability of at most U, for each U from 0 on, where no method is better."""
    doubled = tuple(range(2, 2 * (n + m) + 1, 2))  # doubled ranks without ties: every second sum is a value of U
    tails: Values = np.cumsum(_rank_sum_chances(doubled, n)[n * (n + 1) :: 2])
    return tails


# Ranks that can be shared: who is significantly slower than the best, and who cannot be told apart from it.


def compute_ranks(values: Mapping[str, Sequence[float]], *, more_is_better: bool = False) -> dict[str, int]:
    """Return the rank of each point that has five values or more; the others have none.

    Args:
        values: the measured values by name of the point, all in one unit.
        more_is_better: the largest median leads (a rate) instead of the smallest (a time).
    """
    left = {name: list(own) for name, own in values.items() if len(own) >= LEAST_TO_RANK}
    found: dict[str, int] = {}
    while left:
        level = 1 + len(found)
        shared = find_leaders(left, more_is_better=more_is_better)
        for name in shared:
            found[name] = level
            del left[name]
    return found


def find_leaders(values: Mapping[str, Sequence[float]], *, more_is_better: bool = False) -> list[str]:
    """Return the points that share the first rank, the one with the best median first."""
    sign = -1 if more_is_better else 1
    medians = {name: sign * statistics.median(own) for name, own in values.items()}
    order = sorted(values, key=medians.__getitem__)
    leader = order[0]
    chances = compare_against(values, leader)
    return [leader, *(name for name in order[1:] if chances[name] >= LEVEL)]


def samples_needed(methods: int) -> int:
    """Return how many samples each of `methods` points needs at least so that complete separation is significant."""
    count = LEAST_TO_RANK
    while 2 * (methods - 1) / math.comb(2 * count, count) >= LEVEL:
        count += 1
    return count


def compare_against(values: Mapping[str, Sequence[float]], reference: str) -> dict[str, float]:
    """Return the Holm-adjusted p of every other point against `reference`."""
    others = [name for name in values if name != reference]
    adjusted = adjust_holm(mann_whitney_against([values[name] for name in others], values[reference]))
    return dict(zip(others, adjusted, strict=True))


# How many samples would settle an open question: simulated from the spread that was observed.


def samples_to_settle(one: Sequence[float], other: Sequence[float], tests: int = 1) -> int | None:
    """Return how many samples of each point would tell the two apart with a power of 80 %, None if more than 100.

    The noise is drawn from both points' distances to their own medians (as ratios, smoothed, so that five values are
    no more than what they are); the difference is taken as observed, which makes the number a guide, no promise.

    Args:
        one, other: positive values of the two points, two of each at least.
        tests: how many comparisons the family has; the p must stay below 0.05 after Holm's first step.
    """
    least = max(LEAST_TO_RANK, min(len(one), len(other)))
    for count in (count for count in _COUNTS if count >= least):
        if estimate_power(one, other, count, tests) >= ENOUGH:
            return count
    return None


def estimate_power(one: Sequence[float], other: Sequence[float], count: int, tests: int = 1) -> float:
    """Return the share of simulated sweeps with `count` samples a point that would tell the two points apart."""
    enough = largest_significant_u(count, count, LEVEL / tests)
    if enough < 0 or min(*one, *other) <= 0:
        return 0.0
    shift = abs(math.log(statistics.median(one) / statistics.median(other)))
    noise = _noise(one, other)
    rng = np.random.default_rng(_SEED)
    draws = rng.choice(noise, size=(_TRIALS, 2, count)) + rng.normal(0, _bandwidth(noise), size=(_TRIALS, 2, count))
    below = (draws[:, 0, :, None] > draws[:, 1, None, :] + shift).sum(axis=(1, 2))
    u_values = np.minimum(below, count * count - below)
    return float((u_values <= enough).mean())


def _noise(one: Sequence[float], other: Sequence[float]) -> Values:
    distances = []
    for side in (one, other):
        logs = np.log(np.asarray(side))
        # The median of few values lies closer to them than the true one: the distances are widened by what that hides.
        distances.append((logs - np.median(logs)) * math.sqrt(len(side) / max(1, len(side) - 1)))
    return np.concatenate(distances)


def _bandwidth(noise: Values) -> float:
    """Return Silverman's bandwidth, which turns few distances into a smooth distribution."""
    return float(0.9 * noise.std() * len(noise) ** -0.2)
