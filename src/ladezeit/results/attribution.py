"""Where the time of one point goes that another one does not spend, and whether the settings are the cause."""

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ladezeit.result import Result, Status
from ladezeit.results.comparison import PointFigures
from ladezeit.results.difference import REST, UNATTRIBUTED, Difference, PhaseDifference, compare, largest, self_times
from ladezeit.results.seconds import seconds
from ladezeit.results.standing import NEGLIGIBLE

#: A phase that takes this share of a load is said to be where the time goes.
_MOST_OF_IT = 0.5

#: Sentences of one kind, and phases in one of them.
_MOST_NAMED = 3

_ENDS = ("dtype", "device", "attention")


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
            f"{seconds(phase.difference_s)} s more in {self._name(phase)}{_elsewhere(self.faster, phase)}"
            for phase in self.named
        ]
        said = [f"{self.slower} takes {seconds(total_s)} s, {seconds(total_s - faster_s)} s longer than {self.faster}"]
        said[0] += f": {', '.join(causes)}." if causes else "; no single phase explains it."
        main = self.named[0] if self.named else None
        if main and main.slower_s >= _MOST_OF_IT * total_s:
            said.append(
                f"{seconds(main.slower_s)} s of {seconds(total_s)} s ({100 * main.slower_s / total_s:.0f} %) are spent "
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


def attribute(slower: PointFigures, faster: PointFigures) -> Attribution:
    """Say where `slower` spends what `faster` does not; both have proven samples of one model and cache state."""
    difference = compare(slower.samples, faster.samples)
    named = largest(difference.phases, difference.total_s) if difference.total_s > 0 else []
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


def additions(points: Sequence[PointFigures], explained: Collection[str] = ()) -> list[str]:
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
        parts = [f"{path} ({seconds(spent)} s)" for path, spent in sorted(besides.items(), key=lambda pair: -pair[1])]
        said.append(f"{point.name} has all phases of {nearest.name}, and besides: {', '.join(parts[:_MOST_NAMED])}.")
    return said[:_MOST_NAMED]


def _taken(point: PointFigures) -> dict[str, float]:
    """Return the phases that the point's loads spend time in."""
    return {path: spent for path, spent in phase_medians(point).items() if spent > 0 and path != UNATTRIBUTED}


def _elsewhere(faster: str, phase: PhaseDifference) -> str:
    return f", which {faster} does not have" if phase.faster_s == 0 and phase.path != UNATTRIBUTED else ""


def ends_with(result: Result) -> dict[str, object]:
    """Return what a load ended with: dtype (``float16, bitsandbytes_4bit`` where quantised), device, attention."""
    found: dict[str, object] = {key: result.effective.get(key) for key in _ENDS}
    if result.effective.get("quantisation"):
        # Weights in fewer bits are other weights, whatever the dtype of the rest.
        found["dtype"] = f"{found['dtype']}, {(result.config.get('loading') or {}).get('engine', 'quantised')}"
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
