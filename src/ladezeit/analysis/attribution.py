"""Where the time of one point goes that another one does not spend, and whether the settings are the cause."""

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain

from ladezeit.analysis.comparison import PointFigures
from ladezeit.analysis.standing import NEGLIGIBLE
from ladezeit.errors import LadezeitError
from ladezeit.results.fields import metric_of, value_of
from ladezeit.results.format import format_seconds
from ladezeit.results.records import Result, Status

#: A phase that takes this share of a load is said to be where the time goes.
_MOST_OF_IT = 0.5

#: Sentences of one kind, and phases in one of them.
_MOST_NAMED = 3

_ENDS = ("dtype", "device", "attention")

TOTAL = "load/total_s"

#: Phases are named until they explain this share of the difference, three at most.
_SHARE_TO_NAME = 0.8

#: Medians of parts do not add up to the median of the whole; this line takes up what is left.
REST = "(rest of the medians)"
UNATTRIBUTED = "load/unattributed"


# Why one point loads longer than another: the phases whose differences add up to the whole.


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


@dataclass(frozen=True)
class Attribution:
    """The difference between a slower and a faster point, in phases.

    `settings` names what both ended up with that differs (dtype, device, …); empty where they are the same, so that
    the settings cannot be the cause. `places` has file and line of phases that are functions of a user's own code.
    """

    slower: str
    faster: str
    difference: Difference
    named: list[PhaseDifference]
    settings: dict[str, tuple[str, str]]
    places: dict[str, str] = field(default_factory=dict)

    @property
    def sentences(self) -> list[str]:
        """What was found, in words."""
        total_s, faster_s = self.difference.medians_s
        causes = [
            f"{format_seconds(phase.difference_s)} s more in {self._name(phase)}{_elsewhere(self.faster, phase)}"
            for phase in self.named
        ]
        said = [
            f"{self.slower} takes {format_seconds(total_s)} s, {format_seconds(total_s - faster_s)} s longer than "
            f"{self.faster}"
        ]
        said[0] += f": {', '.join(causes)}." if causes else "; no single phase explains it."
        main = self.named[0] if self.named else None
        if main and main.slower_s >= _MOST_OF_IT * total_s:
            said.append(
                f"{format_seconds(main.slower_s)} s of {format_seconds(total_s)} s "
                f"({100 * main.slower_s / total_s:.0f} %) are spent "
                f"in {self._name(main)}."
            )
        if self.settings:
            differ = "; ".join(f"{key}: {one} / {other}" for key, (one, other) in self.settings.items())
            said.append(f"They do not load the same: {differ}. The settings may be the cause.")
        else:
            said.append("Both end with the same dtype on the same device: the settings are not the cause.")
        return said

    def _name(self, phase: PhaseDifference) -> str:
        if phase.path == UNATTRIBUTED:
            return "no phase that is known (profile=true looks into it)"
        place = self.places.get(phase.path)
        return f"{phase.path} ({place})" if place else phase.path


def explain_difference(slower: PointFigures, faster: PointFigures) -> Attribution:
    """Say where `slower` spends what `faster` does not; both have verified samples of one model and cache state."""
    difference = compare_phases(slower.samples, faster.samples)
    named = select_largest(difference.phases, difference.total_s) if difference.total_s > 0 else []
    return Attribution(
        slower=slower.name,
        faster=faster.name,
        difference=difference,
        named=[phase for phase in named if phase.path != REST],
        settings=_differing_settings(slower.samples, faster.samples),
        places=next((known for r in slower.samples if (known := r.effective.get("functions"))), {}),
    )


def phase_medians(point: PointFigures) -> dict[str, float]:
    """Return the median self time of each phase of the point's load in seconds, `UNATTRIBUTED` among them."""
    ok = [result for result in point.samples if result.status is Status.ok]
    return {path: statistics.median(values) for path, values in self_times(ok).items()}


def main_phases(point: PointFigures, share: float = 0.8) -> list[tuple[str, float, float]]:
    """Return the phases that make up most of a point's load: name, median seconds, share of the load."""
    times = phase_medians(point)
    total_s = sum(times.values())
    found: list[tuple[str, float, float]] = []
    for path, spent_s in sorted(times.items(), key=lambda pair: -pair[1]):
        if total_s <= 0 or len(found) == 3 or sum(part for _, _, part in found) >= share:
            break
        found.append((path, spent_s, spent_s / total_s))
    return found


def find_added_phases(points: Sequence[PointFigures], explained: Collection[str] = ()) -> list[str]:
    """Say which points have all phases of another one, and more that matter: work that it could do without.

    This holds where nothing can be told apart, and below five samples too. Points named in `explained` are left out.
    """
    phases = {point.point: _taken(point) for point in points}
    said = []
    for point in points:
        own = phases[point.point]
        within = [other for other in points if set(phases[other.point]) < set(own) and ends_of(other) == ends_of(point)]
        if not within or point.name in explained:
            continue
        nearest = max(within, key=lambda other: len(phases[other.point]))
        besides = {path: spent for path, spent in own.items() if path not in phases[nearest.point]}
        if sum(besides.values()) < NEGLIGIBLE * sum(own.values()):
            continue
        parts = [
            f"{path} ({format_seconds(spent)} s)" for path, spent in sorted(besides.items(), key=lambda pair: -pair[1])
        ]
        said.append(f"{point.name} has all phases of {nearest.name}, plus: {', '.join(parts[:_MOST_NAMED])}.")
    return said[:_MOST_NAMED]


def _taken(point: PointFigures) -> dict[str, float]:
    """Return the phases that the point's loads spend time in."""
    return {path: spent for path, spent in phase_medians(point).items() if spent > 0 and path != UNATTRIBUTED}


def _elsewhere(faster: str, phase: PhaseDifference) -> str:
    return f", which {faster} does not have" if phase.faster_s == 0 and phase.path != UNATTRIBUTED else ""


def ends_with(result: Result) -> dict[str, object]:
    """Return what a load ended with: dtype (``float16, bitsandbytes_4bit`` where quantized), device, attention."""
    found: dict[str, object] = {key: result.effective.get(key) for key in _ENDS}
    if result.effective.get("quantisation"):
        # Weights in fewer bits are other weights, whatever the dtype of the rest.
        found["dtype"] = f"{found['dtype']}, {(result.config.get('loading') or {}).get('engine', 'quantized')}"
    return found


def ends_of(point: PointFigures) -> tuple[str, str]:
    """Return the dtype and the device that a point's loads end with."""
    found = ends_with(next((result for result in point.samples if result.effective), point.samples[0]))
    return str(found["dtype"]), str(found["device"])


def _differing_settings(one: Sequence[Result], other: Sequence[Result]) -> dict[str, tuple[str, str]]:
    """Return what was effective in both and differs: dtype, device, attention."""
    found = {}
    for key in _ENDS:
        sides = [
            "/".join(sorted({str(ends_with(r)[key]) for r in side if ends_with(r)[key] is not None}))
            for side in (one, other)
        ]
        if all(sides) and sides[0] != sides[1]:
            found[key] = (sides[0], sides[1])
    return found


def compare_phases(one: Sequence[Result], other: Sequence[Result]) -> Difference:
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
                f"the samples differ in {key} ({', '.join(sorted(found))}): compare configurations that agree in it"
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


def select_largest(phases: list[PhaseDifference], lost_s: float) -> list[PhaseDifference]:
    """Return the phases that took longer, largest first, until they explain most of `lost_s`."""
    named: list[PhaseDifference] = []
    for phase in sorted(phases, key=lambda phase: -phase.difference_s):
        explained_s = sum(earlier.difference_s for earlier in named)
        if phase.difference_s <= 0 or len(named) == _MOST_NAMED or explained_s >= _SHARE_TO_NAME * lost_s:
            break
        named.append(phase)
    return named
