"""Why one point loads longer than another: the phases whose differences add up to the whole."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from ladezeit.errors import LadezeitError
from ladezeit.result import Result, Status
from ladezeit.results.points import metric_of
from ladezeit.results.seconds import seconds
from ladezeit.results.statistics import LEVEL, mann_whitney
from ladezeit.results.varying import value_of

TOTAL = "load/total_s"

#: Fewer samples a side cannot reach the level: with 3 and 3 the smallest exact p is 0.10, with 4 and 4 it is 0.029.
LEAST_SAMPLES = 4

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
    """Two points compared, the one with the larger median first.

    The `difference_s` of all `phases` add up to `total_s`. `p_value` is that of the exact two-sided Mann-Whitney test
    of the load totals, None where a side has fewer than four samples.
    """

    slower: str
    faster: str
    cache: str
    medians_s: tuple[float, float]
    phases: list[PhaseDifference]
    n: tuple[int, int]
    p_value: float | None

    @property
    def total_s(self) -> float:
        """Median load of the slower side less that of the faster one."""
        return self.medians_s[0] - self.medians_s[1]

    @property
    def distinguishable(self) -> bool | None:
        """Whether chance is an unlikely cause; None where there are too few samples to say."""
        return None if self.p_value is None else self.p_value < LEVEL

    @property
    def sentence(self) -> str:
        """What was found, in words: which side is slower, by how much, how surely, and through which phases."""
        medians = f"medians {seconds(self.medians_s[0])} and {seconds(self.medians_s[1])} s"
        counts = f"n = {self.n[0]} and {self.n[1]}"
        if self.p_value is not None and not self.distinguishable:
            return (
                f"{self.slower} and {self.faster} are not distinguishable ({self.cache}, {counts}): {medians}, "
                f"exact Mann-Whitney p = {self.p_value:.2f}.{self._own_phases()}"
            )
        longer = f"{seconds(self.total_s)} s longer than {self.faster}"
        cause = _cause(self.total_s, self.phases)
        if self.p_value is None:
            return (
                f"{self.slower} took {longer} ({self.cache}, {medians}){cause}. "
                f"Too few samples to tell it from chance: {counts}, each side needs {LEAST_SAMPLES}."
            )
        chance = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        return f"{self.slower} takes {longer} ({self.cache}, {counts}, {chance}){cause}."

    def _own_phases(self) -> str:
        """Return a sentence about the phases that one side has alone: a cost that is sure, even if it is too small."""
        own: dict[str, list[str]] = {}
        for phase in self.phases:
            if phase.path != REST and bool(phase.slower_s) != bool(phase.faster_s):
                name, spent_s = (self.slower, phase.slower_s) if phase.slower_s else (self.faster, phase.faster_s)
                own.setdefault(name, []).append(f"{phase.path} ({seconds(spent_s)} s)")
        return "".join(f" Only {name} has {' and '.join(paths)}." for name, paths in own.items())


def compare(one: Sequence[Result], other: Sequence[Result], key: str = "loading") -> Difference:
    """Compare the samples of two points and name the phases that make the difference.

    Args:
        one: samples of a point, at the same model and cache state as `other`; only the `ok` ones count.
        other: samples of another point.
        key: the config key whose value names the sides in the sentence.

    Raises:
        LadezeitError: a side has no `ok` sample, or model or cache state differ.
    """
    sides = [[result for result in side if result.status is Status.ok] for side in (one, other)]
    _check_comparable(one, other, sides)
    slower, faster = sorted(sides, key=_total, reverse=True)
    names = value_of(slower[0], key), value_of(faster[0], key)
    phases = _phase_differences(slower, faster, _total(slower) - _total(faster))
    return Difference(
        slower=names[0],
        faster=names[1],
        cache=value_of(slower[0], "cache"),
        medians_s=(_total(slower), _total(faster)),
        phases=phases,
        n=(len(slower), len(faster)),
        p_value=_chance(metric_of(slower, TOTAL), metric_of(faster, TOTAL)),
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


def _chance(one: list[float], other: list[float]) -> float | None:
    """Return the exact two-sided p of the Mann-Whitney test, None where there are too few values for it."""
    if min(len(one), len(other)) < LEAST_SAMPLES:
        return None
    return mann_whitney(one, other)


def _cause(total_s: float, phases: list[PhaseDifference]) -> str:
    """Return ``: 0.19 s of it (90 %) is load/module_walk``, or the gains and losses where they offset each other."""
    if total_s <= 0:
        return ""
    savings = [phase for phase in phases if phase.difference_s < -(1 - _SHARE_TO_NAME) * total_s]
    longer = largest(phases, total_s - sum(phase.difference_s for phase in savings))
    if savings:
        parts = [f"{seconds(phase.difference_s)} s more in {phase.path}" for phase in longer]
        parts += [f"{seconds(-phase.difference_s)} s less in {phase.path}" for phase in savings]
    else:
        parts = [
            f"{seconds(phase.difference_s)} s{' of it' if not index else ''} "
            f"({100 * phase.difference_s / total_s:.0f} %) is {phase.path}"
            for index, phase in enumerate(longer)
        ]
    return ": " + ", ".join(parts)


def largest(phases: list[PhaseDifference], lost_s: float) -> list[PhaseDifference]:
    """Return the phases that took longer, largest first, until they explain most of `lost_s`."""
    named: list[PhaseDifference] = []
    for phase in sorted(phases, key=lambda phase: -phase.difference_s):
        explained_s = sum(earlier.difference_s for earlier in named)
        if phase.difference_s <= 0 or len(named) == _MOST_NAMED or explained_s >= _SHARE_TO_NAME * lost_s:
            break
        named.append(phase)
    return named
