"""What became of each point: slower beyond the limit, no longer verified, missing, or nothing of that.

The rule. A point is slower only if two things hold. The whole interval of its ratio to the baseline (Hodges-Lehmann,
inverted Mann-Whitney test) lies beyond the limit; and the exact one-sided test against "exactly at the limit", adjusted
by Holm over all points, is below 0.05. So a sweep in which no point is slower than the limit fails in at most 5 % of
the cases, however many points it has. A family in which not even complete separation would reach that is refused: a
gate that cannot close is none.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from ladezeit.analysis.comparison import CONDITIONS, format_setting, title_of
from ladezeit.analysis.eligibility import LOAD, exclusion_reason, more_is_better
from ladezeit.analysis.statistics import (
    LEAST_TO_RANK,
    LEVEL,
    Ratio,
    adjust_holm,
    estimate_ratio,
    mann_whitney,
    samples_to_settle,
)
from ladezeit.errors import LadezeitError
from ladezeit.results.fields import NOT_MEASURED, failure_reason, metric_of, value_of
from ladezeit.results.records import Result, Status

#: The sample was not started, or the machine was not in the state that was asked for: no fault of the method.
_NOT_MEASURED = (Status.skipped, Status.invalid)


class Outcome(Enum):
    """What became of a point."""

    slower = "slower"  # significantly slower, by more than the limit
    broken = "broken"  # verified in the baseline, and now wrong, failing, out of memory, or unverified
    missing = "missing"  # in the baseline, and not measured now
    undecided = "undecided"  # the limit lies inside the interval, or there are too few samples
    within = "within"  # slower by less than the limit, if at all
    new = "new"  # not in the baseline
    unproven_before = "unproven_before"  # not verified in the baseline


#: What the gate is for; `missing` counts too unless the caller allows it.
REGRESSIONS = (Outcome.slower, Outcome.broken)


@dataclass(frozen=True)
class PointCheck:
    """One point: its outcome and, where both sides were measured, medians, ratio and p.

    `ratio` is how many times as long as before (for a rate: how many times less); `p` is one-sided against the
    limit and Holm-adjusted; `samples` of each side would settle what is undecided, None where more than a hundred.
    """

    conditions: dict[str, str]
    name: str
    outcome: Outcome
    reason: str
    n_before: int = 0
    n_now: int = 0
    before: float | None = None
    now: float | None = None
    ratio: Ratio | None = None
    p: float | None = None
    samples: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The conditions in words."""
        return title_of(self.conditions)


@dataclass(frozen=True)
class Check:
    """All points, the most telling outcomes first, and whether the gate closes."""

    metric: str
    limit: float
    points: list[PointCheck]
    allow_missing: bool

    @property
    def failing(self) -> list[PointCheck]:
        """The points that close the gate."""
        closing = REGRESSIONS if self.allow_missing else (*REGRESSIONS, Outcome.missing)
        return [point for point in self.points if point.outcome in closing]

    def count_outcome(self, outcome: Outcome) -> int:
        """Return how many points ended so."""
        return sum(point.outcome is outcome for point in self.points)


def check_regressions(
    before: Sequence[Result],
    now: Sequence[Result],
    varying: Sequence[str],
    *,
    limit: float,
    metric: str = LOAD,
    allow_missing: bool = False,
) -> Check:
    """Hold the samples `now` against those of `before`.

    Args:
        before, now: samples of one machine.
        varying: the config keys that tell the points apart.
        limit: the slowdown that is still allowed, as a share: 0.1 allows 1.1 times as long.
        metric: what is compared; of a rate, 1.1 times less is the same slowdown.
        allow_missing: points that were not measured now do not close the gate.

    Raises:
        LadezeitError: there is nothing to compare, or too few samples to ever find a slowdown.
    """
    keys = [key for key in varying if key not in CONDITIONS and key != "sample"]
    found = [(pair, _state(pair, keys, metric)) for pair in pair_points(before, now)]
    measured = [index for index, (_, point) in enumerate(found) if point.outcome is Outcome.undecided]
    enough = [i for i in measured if min(found[i][1].n_before, found[i][1].n_now) >= LEAST_TO_RANK]
    _refuse_blind(found, measured, enough)
    values = [(metric_of(found[i][0].before, metric), metric_of(found[i][0].now, metric)) for i in enough]
    sides = [(old, new) if not more_is_better(metric) else (new, old) for old, new in values]
    chances = adjust_holm([_chance(old, new, limit) for old, new in sides])
    judged = dict(zip(enough, zip(sides, chances, strict=True), strict=True))
    points = [
        _judged(point, *judged[i][0], p=judged[i][1], limit=limit, tests=len(enough)) if i in judged else point
        for i, (_, point) in enumerate(found)
    ]
    order = list(Outcome)
    return Check(metric, limit, sorted(points, key=lambda point: order.index(point.outcome)), allow_missing)


# Which points of the new results are which of the baseline's, also where a newer ladezeit knows more options.


@dataclass(frozen=True)
class Pair:
    """The samples of one point before and now; one side is empty where the point is missing there.

    `unknown_before` are the options that only one side's config has: the points agree in all others.
    """

    before: list[Result]
    now: list[Result]
    unknown_before: list[str]


def _state(pair: Pair, keys: Sequence[str], metric: str) -> PointCheck:
    """Return what can be said without any test; points that were measured on both sides come back `undecided`."""
    known = (pair.before or pair.now)[0]
    words = [format_setting(key, value) for key in keys if (value := value_of(known, key))]
    old, new = metric_of(pair.before, metric), metric_of(pair.now, metric)
    point = PointCheck(
        conditions={key: value_of(known, key) for key in CONDITIONS},
        name=" · ".join(words) or value_of(known, "loading"),
        outcome=Outcome.undecided,
        reason="",
        n_before=len(old),
        n_now=len(new),
        before=statistics.median(old) if old else None,
        now=statistics.median(new) if new else None,
        notes=[f"only one side knows {', '.join(pair.unknown_before)}"] if pair.unknown_before else [],
    )
    if not pair.before:
        return replace(point, outcome=Outcome.new, reason="not in the baseline")
    doubt = exclusion_reason(pair.before) or (None if old else f"no sample has {metric}")
    if doubt:
        return replace(point, outcome=Outcome.unproven_before, reason=f"the baseline is not verified: {doubt}")
    if absent := _absent(pair.now, new, metric):
        return replace(point, outcome=Outcome.missing, reason=absent)
    if broken := _broken(pair):
        return replace(point, outcome=Outcome.broken, reason=broken)
    if min(len(old), len(new)) < LEAST_TO_RANK:
        few = (
            f"{len(old)} samples before and {len(new)} now: fewer than {LEAST_TO_RANK} on a side cannot show a slowdown"
        )
        return replace(point, reason=few, samples=LEAST_TO_RANK)
    return point


def _absent(now: Sequence[Result], values: Sequence[float], metric: str) -> str | None:
    """Return why the point was not measured now, None where it was."""
    if not now:
        return "not among the new results"
    unmeasured = [result for result in now if result.status in _NOT_MEASURED]
    if len(unmeasured) == len(now):
        return f"{len(now)} of {len(now)} {unmeasured[0].status.value}: {failure_reason(unmeasured[0])}"
    if not values and any(result.status is Status.ok for result in now):
        return f"no new sample has {metric}"
    return None


def _broken(pair: Pair) -> str | None:
    """Return how a point that was verified is not any more; one that failed now and then before may do so again."""
    if reason := exclusion_reason(pair.now):
        return reason
    bad_now, bad_before = (
        [r for r in side if r.status not in (Status.ok, *_NOT_MEASURED)] for side in (pair.now, pair.before)
    )
    if not bad_now or bad_before:
        return None
    (status, reason), count = Counter((result.status, failure_reason(result)) for result in bad_now).most_common(1)[0]
    return f"{count} of {len(pair.now)} {status.value} (none in the baseline): {reason}"


def _refuse_blind(found: Sequence[tuple[Pair, PointCheck]], measured: Sequence[int], enough: Sequence[int]) -> None:
    """Raise `LadezeitError` where no slowdown could be significant, whatever was measured."""
    if not any(pair.before and pair.now for pair, _ in found):
        raise LadezeitError(
            "no configuration of the baseline is among the new results: they differ in more than the options that "
            "another version of ladezeit would add. Measure the baseline's configurations, or select some with --where"
        )
    if measured and not enough:
        raise LadezeitError(
            f"{found[measured[0]][1].reason}. A gate that cannot close is useless: "
            f"measure sample=range({LEAST_TO_RANK}) or more"
        )
    least = [1 / math.comb(p.n_before + p.n_now, p.n_now) for i in enough for p in [found[i][1]]]
    if least and min(least) * len(enough) >= LEVEL:
        count = LEAST_TO_RANK
        while len(enough) / math.comb(2 * count, count) >= LEVEL:
            count += 1
        raise LadezeitError(
            f"{len(enough)} configurations are too many for so few samples: even complete separation would not be "
            f"significant. Measure sample=range({count}), or select fewer configurations with --where"
        )


def _chance(old: Sequence[float], new: Sequence[float], limit: float) -> float:
    """Return the one-sided p of the exact test that `new` is slower than `old` by more than the limit."""
    scaled = [value / (1 + limit) for value in new]
    two_sided = mann_whitney(scaled, old)
    larger = sum((a > b) - (a < b) for a in scaled for b in old)
    return two_sided / 2 if larger > 0 else 1 - two_sided / 2


def _judged(
    point: PointCheck, old: Sequence[float], new: Sequence[float], *, p: float, limit: float, tests: int
) -> PointCheck:
    found = estimate_ratio(new, old)
    if found is None:
        equal = sorted(old) == sorted(new)
        return replace(
            point,
            outcome=Outcome.within if equal else Outcome.undecided,
            reason="the same values as before" if equal else "a value is not positive: there is no ratio",
        )
    point = replace(point, ratio=found, p=p)
    if found.interval.low > 1 + limit and p < LEVEL:
        return replace(point, outcome=Outcome.slower, reason="significantly slower than the limit")
    if found.interval.high <= 1 + limit:
        faster = found.interval.high < 1
        return replace(point, outcome=Outcome.within, reason="faster than before" if faster else "within the limit")
    return replace(
        point,
        reason="not distinguishable from the limit",
        samples=samples_to_settle([value / (1 + limit) for value in new], old, tests),
    )


#: Every option of a config, by group and name.
_Flat = dict[str, str]


def pair_points(before: Sequence[Result], now: Sequence[Result]) -> list[Pair]:
    """Return the points of both sides, the baseline's first and in its order, then those that are new.

    Points are the same where their ids are. A ladezeit with more or fewer options gives other ids: then two points are
    the same where they agree in every option that both know, and no other point of either side does so too.
    """
    old, new = _by_point(before), _by_point(now)
    partner = {point: point for point in old if point in new}
    flat = {point: _flat(samples[0].config) for side in (old, new) for point, samples in side.items()}
    alone = {point: flat[point] for point in old if point not in partner}
    free = {point: flat[point] for point in new if point not in partner}
    for point, config in alone.items():
        fitting = [other for other, known in free.items() if _agree(config, known)]
        if len(fitting) == 1 and sum(_agree(free[fitting[0]], known) for known in alone.values()) == 1:
            partner[point] = fitting[0]
    found = []
    for point, samples in old.items():
        other = partner.get(point)
        unknown = sorted(flat[point].keys() ^ flat[other].keys()) if other else []
        found.append(Pair(samples, new[other] if other else [], unknown))
    taken = set(partner.values())
    return found + [Pair([], samples, []) for point, samples in new.items() if point not in taken]


def _by_point(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.identity.point, []).append(result)
    return groups


def _agree(one: _Flat, other: _Flat) -> bool:
    """Say whether all options that both know are equal; two configs without a common option do not agree."""
    common = one.keys() & other.keys()
    return bool(common) and all(one[key] == other[key] for key in common)


def _flat(config: Mapping[str, Any]) -> _Flat:
    return dict(_options({key: value for key, value in config.items() if key not in NOT_MEASURED}))


def _options(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield ``group.option`` and its value; what lies deeper (a device map) is one value, so that it differs as one."""
    for group, node in config.items():
        inner = node.items() if isinstance(node, Mapping) else [("", node)]
        for name, value in inner:
            yield f"{group}.{name}".rstrip("."), json.dumps(value, sort_keys=True, default=str)
