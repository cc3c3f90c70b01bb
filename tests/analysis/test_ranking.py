"""Shared ranks and their promise: equal methods share a rank, and nobody wins by chance more often than said."""

import numpy as np
import pytest

from ladezeit.analysis.statistics import compute_ranks, estimate_power, samples_to_settle

FAST = [1.00, 1.01, 1.02, 1.03, 1.04]


def shifted(by: float) -> list[float]:
    return [value * by for value in FAST]


def test_what_cannot_be_told_apart_shares_a_rank() -> None:
    found = compute_ranks({"slow": shifted(2.0), "a": FAST, "b": shifted(1.001), "slowest": shifted(3.0)})
    assert found == {"a": 1, "b": 1, "slow": 3, "slowest": 4}


def test_rates_are_ranked_from_the_top() -> None:
    assert compute_ranks({"a": FAST, "b": shifted(2.0)}, more_is_better=True) == {"b": 1, "a": 2}


def test_nobody_is_ranked_below_five_samples() -> None:
    assert compute_ranks({"quick": [0.1, 0.1, 0.1, 0.1], "a": FAST}) == {"a": 1}
    assert compute_ranks({"a": [1.0, 2.0]}) == {} and compute_ranks({}) == {}


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("methods", [2, 4])
@pytest.mark.parametrize("sigma", [0.05, 1.0])
def test_equal_methods_rarely_have_a_winner(n: int, methods: int, sigma: float) -> None:
    """1,000 simulated sweeps; the full study is benchmarks/calibration.py."""
    rng = np.random.default_rng(7)
    winners = 0
    for _ in range(1000):
        values = {str(m): rng.lognormal(0, sigma, n).tolist() for m in range(methods)}
        winners += sum(rank == 1 for rank in compute_ranks(values).values()) == 1
    assert winners / 1000 <= 0.05


def test_power_grows_with_samples_and_the_proposal_uses_it() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.lognormal(0, 0.1, 5).tolist(), rng.lognormal(0.12, 0.1, 5).tolist()
    assert estimate_power(one, other, 5) < estimate_power(one, other, 20) < estimate_power(one, other, 60)
    proposed = samples_to_settle(one, other)
    assert proposed is not None and estimate_power(one, other, proposed) >= 0.8
    assert samples_to_settle(FAST, FAST) is None
    assert samples_to_settle(FAST, shifted(2.0)) == 5
    assert estimate_power(FAST, shifted(2.0), 3) == 0.0
