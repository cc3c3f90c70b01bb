"""Ranks that can be shared: who is proven to be slower than the best, and who cannot be told apart from it.

The rule. Of the points with five samples or more, the one with the best median leads. Every other one is tested
against the leader (exact Mann-Whitney, two-sided), adjusted by Holm's method over these tests. Those that are not
below 0.05 share the leader's rank. The rest is ranked in the same way with the next numbers: 1, 1, 3, ...

What it promises. Of two or more equally good methods, one is called the only best in at most 5 % of the sweeps: it
would have to win a two-sided test at that level against each of them. That the leader is chosen by the same data does
not raise this rate, but it raises the rate at which *some* equal method falls out of a large shared rank. Both rates
are measured by ``benchmarks/calibration.py`` and stand in docs/reading-a-verdict.md.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from ladezeit.results.statistics import LEAST_TO_RANK, LEVEL, holm, mann_whitney_against


def ranks(values: Mapping[str, Sequence[float]], *, more_is_better: bool = False) -> dict[str, int]:
    """Return the rank of each point that has five values or more; the others have none.

    Args:
        values: the measured values by name of the point, all in one unit.
        more_is_better: the largest median leads (a rate) instead of the smallest (a time).
    """
    left = {name: list(own) for name, own in values.items() if len(own) >= LEAST_TO_RANK}
    found: dict[str, int] = {}
    while left:
        level = 1 + len(found)
        shared = leaders(left, more_is_better=more_is_better)
        for name in shared:
            found[name] = level
            del left[name]
    return found


def leaders(values: Mapping[str, Sequence[float]], *, more_is_better: bool = False) -> list[str]:
    """Return the points that share the first rank, the one with the best median first."""
    sign = -1 if more_is_better else 1
    medians = {name: sign * statistics.median(own) for name, own in values.items()}
    order = sorted(values, key=medians.__getitem__)
    leader = order[0]
    chances = against(values, leader)
    return [leader, *(name for name in order[1:] if chances[name] >= LEVEL)]


def samples_needed(methods: int) -> int:
    """Return how many samples each of `methods` points needs at least so that complete separation can be proven."""
    count = LEAST_TO_RANK
    while 2 * (methods - 1) / math.comb(2 * count, count) >= LEVEL:
        count += 1
    return count


def against(values: Mapping[str, Sequence[float]], reference: str) -> dict[str, float]:
    """Return the Holm-adjusted p of every other point against `reference`."""
    others = [name for name in values if name != reference]
    adjusted = holm(mann_whitney_against([values[name] for name in others], values[reference]))
    return dict(zip(others, adjusted, strict=True))
