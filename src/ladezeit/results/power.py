"""How many samples would settle an open question: simulated from the spread that was observed."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from ladezeit.results.statistics import LEAST_TO_RANK, LEVEL, Values, largest_significant_u

#: A question counts as settled by a number of samples that would settle it in this share of the sweeps.
ENOUGH = 0.8

#: More samples than this are not proposed: a difference that needs them is too small to matter to a person.
MOST_SAMPLES = 100

_COUNTS = (5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40, 50, 65, 80, MOST_SAMPLES)
_TRIALS = 400
_SEED = 20260301


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
        if power(one, other, count, tests) >= ENOUGH:
            return count
    return None


def power(one: Sequence[float], other: Sequence[float], count: int, tests: int = 1) -> float:
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
