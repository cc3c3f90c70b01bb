"""Why one point loads longer than another: the phases whose differences add up to the whole."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from ladezeit.errors import LadezeitError
from ladezeit.result import Result, Status
from ladezeit.results.points import metric_of
from ladezeit.results.varying import value_of

TOTAL = "load/total_s"

#: Phases are named until they explain this share of the difference, three at most.
_SHARE_TO_NAME = 0.8
_MOST_NAMED = 3

#: Medians of parts do not add up to the median of the whole; this line takes up what is left.
REST = "(rest of the medians)"
UNATTRIBUTED = "load/unattributed"


@dataclass(frozen=True)
class PhaseDifference:
    """Median self time of a phase on both sides, in seconds; `difference_s` is slower less faster."""

    path: str
    slower_s: float
    faster_s: float
    difference_s: float


@dataclass(frozen=True)
class Difference:
    """Two points compared, the slower first by the medians of their loads.

    The `difference_s` of all `phases` add up to `total_s`.
    """

    medians_s: tuple[float, float]
    phases: list[PhaseDifference]

    @property
    def total_s(self) -> float:
        """Median load of the slower side less that of the faster one."""
        return self.medians_s[0] - self.medians_s[1]


def compare(one: Sequence[Result], other: Sequence[Result]) -> Difference:
    """Compare the samples of two points and name the phases that make the difference.

    Args:
        one: samples of a point, at the same model and cache state as `other`; only the `ok` ones count.
        other: samples of another point.

    Raises:
        LadezeitError: a side has no `ok` sample, or model or cache state differ.
    """
    sides = [[result for result in side if result.status is Status.ok] for side in (one, other)]
    _check_comparable(one, other, sides)
    slower, faster = sorted(sides, key=_total, reverse=True)
    phases = _phase_differences(slower, faster, _total(slower) - _total(faster))
    return Difference(
        medians_s=(_total(slower), _total(faster)),
        phases=phases,
    )


def _check_comparable(one: Sequence[Result], other: Sequence[Result], sides: list[list[Result]]) -> None:
    for side, usable in zip((one, other), sides, strict=True):
        if not metric_of(usable, TOTAL):
            raise LadezeitError(f"one side has {len(side)} samples but none that is ok: nothing to compare")
    for key in ("model", "cache"):
        found = {value_of(result, key) for result in chain(*sides)}
        if len(found) > 1:
            raise LadezeitError(
                f"the samples differ in {key} ({', '.join(sorted(found))}): compare points that are equal in it"
            )


def _total(side: Sequence[Result]) -> float:
    return statistics.median(metric_of(side, TOTAL))


def _phase_differences(slower: list[Result], faster: list[Result], total_s: float) -> list[PhaseDifference]:
    """Return every phase of the load by size of its difference, the rest of the medians last."""
    times = [self_times(slower), self_times(faster)]
    phases = []
    for path in dict.fromkeys(chain(*times)):
        sides = [statistics.median(by_path.get(path, [0.0])) for by_path in times]
        phases.append(PhaseDifference(path, sides[0], sides[1], sides[0] - sides[1]))
    phases.sort(key=lambda phase: -abs(phase.difference_s))
    rest = total_s - sum(phase.difference_s for phase in phases)
    return [*phases, PhaseDifference(REST, max(rest, 0.0), max(-rest, 0.0), rest)]


def self_times(side: list[Result]) -> dict[str, list[float]]:
    """Return the self time of each phase of the load in every sample, 0.0 where a sample does not have the phase."""
    samples = []
    for result in side:
        times: dict[str, float] = {}
        for phase in result.phases:
            if phase.path == "load" or phase.path.startswith("load/"):
                path = UNATTRIBUTED if phase.path == "load" else phase.path
                times[path] = times.get(path, 0.0) + phase.self_s
        if not times:  # phases=off: the whole load is one span that nobody looked into
            times[UNATTRIBUTED] = result.metrics.get("load/unattributed_s", result.metrics[TOTAL])
        samples.append(times)
    paths = dict.fromkeys(chain(*samples))
    return {path: [times.get(path, 0.0) for times in samples] for path in paths}


def largest(phases: list[PhaseDifference], lost_s: float) -> list[PhaseDifference]:
    """Return the phases that took longer, largest first, until they explain most of `lost_s`."""
    named: list[PhaseDifference] = []
    for phase in sorted(phases, key=lambda phase: -phase.difference_s):
        explained_s = sum(earlier.difference_s for earlier in named)
        if phase.difference_s <= 0 or len(named) == _MOST_NAMED or explained_s >= _SHARE_TO_NAME * lost_s:
            break
        named.append(phase)
    return named
