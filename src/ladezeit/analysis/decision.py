"""The decision that samples allow: the best method per objective, what the current one costs, how sure that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ladezeit.analysis.attribution import Attribution, ends_of, explain_difference, find_added_phases, main_phases
from ladezeit.analysis.comparison import (
    BASELINE,
    CONDITIONS,
    Comparison,
    PointFigures,
    Section,
    compare_points,
    title_of,
)
from ladezeit.analysis.eligibility import LOAD, OBJECTIVES
from ladezeit.analysis.standing import NEGLIGIBLE, Standing, State, rank_methods
from ladezeit.analysis.statistics import Ratio, compare_against, estimate_ratio
from ladezeit.errors import LadezeitError
from ladezeit.results.fields import Condition, matches_conditions
from ladezeit.results.records import Result


@dataclass(frozen=True)
class Current:
    """The config in use, compared with the best: `optimal` is None where it cannot be said.

    `cost_s` is the difference of the load medians, `ratio` the pairwise one to the best with its interval, `p`
    Holm-adjusted.
    """

    point: PointFigures
    optimal: bool | None
    cost_s: float | None
    ratio: Ratio | None
    p: float | None


@dataclass(frozen=True)
class Headroom:
    """What the machine would allow: the load at the binding ceiling, and what the best takes beyond it, in seconds."""

    ceiling: str
    gb_per_s: float
    at_ceiling_s: float
    left_s: float
    share: float


@dataclass(frozen=True)
class Decision:
    """Everything said about one section: points of one model, cache state, process kind and device.

    `current_apart` is the config in use where it is one of those that are not ranked; without `current_named` nobody
    said which one is in use, and it is the baseline.

    `additions` are sentences about work that a method does besides all that another one does.

    `dtypes` has the ranked points by the dtype that their loads end with, where that is not the same for all: weights
    of another dtype are other weights.

    `best_at_all` are among the best in every objective that was measured (two at least); where there are none,
    `pareto` are those that no other beats in every respect.
    """

    conditions: dict[str, str]
    standings: list[Standing]
    current: Current | None
    current_apart: PointFigures | None
    current_named: bool
    attributions: list[Attribution]
    additions: list[str]
    phases: list[tuple[str, float, float]]
    room: Headroom | None
    pareto: list[PointFigures]
    best_at_all: list[PointFigures]
    apart: list[PointFigures]
    failing: list[PointFigures] = field(default_factory=list)
    dtypes: dict[str, list[PointFigures]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The conditions in words."""
        return title_of(self.conditions)

    @property
    def load(self) -> Standing:
        """The standing of the load time."""
        return self.standings[0]


def decide_methods(
    results: Sequence[Result],
    varying: Sequence[str],
    *,
    current: Sequence[Condition] | None = None,
    baseline: Sequence[Condition] | None = None,
) -> tuple[list[Decision], list[str]]:
    """Decide section by section; also returns notes that hold for all of them.

    Args:
        results: samples of one machine.
        varying: the config keys that tell the points apart.
        current: conditions that the config in use meets; None takes the baseline's.
        baseline: as in `compare_points`.

    Raises:
        LadezeitError: as `compare_points`; or no point, or several of one section, meet `current`.
    """
    return decide_on(compare_objectives(results, varying), results, varying, current=current, baseline=baseline)


def compare_objectives(results: Sequence[Result], varying: Sequence[str]) -> list[Comparison]:
    """Return the comparison by each of `OBJECTIVES`, in their order; raises as `compare_points`."""
    return [compare_points(results, varying, metric=objective.metric) for objective in OBJECTIVES]


def decide_on(
    compared: Sequence[Comparison],
    results: Sequence[Result],
    varying: Sequence[str],
    *,
    current: Sequence[Condition] | None = None,
    baseline: Sequence[Condition] | None = None,
) -> tuple[list[Decision], list[str]]:
    """Decide as `decide_methods` does, on what `compare_objectives` returned for the same samples."""
    keys = [key for key in varying if key not in CONDITIONS]
    wanted = current or baseline
    if wanted and not any(matches_conditions(result, wanted) for result in results):
        raise LadezeitError(
            f"no sample is of the current config {' '.join(f'{k}={v}' for k, v in wanted)}: "
            f"the samples differ in {', '.join(keys) or 'nothing'}"
        )
    decisions = []
    for index, section in enumerate(compared[0].sections):
        own = {o.name: c.sections[index] for o, c in zip(OBJECTIVES, compared, strict=True)}
        decisions.append(_decision(section, own, wanted or BASELINE, strict=wanted is not None))
    return decisions, compared[0].notes


def _decision(
    section: Section, by_objective: Mapping[str, Section], wanted: Sequence[Condition], *, strict: bool
) -> Decision:
    standings = [rank_methods(objective, by_objective[objective.name]) for objective in OBJECTIVES]
    best_at_all, pareto = best_overall(standings)
    load = standings[0]
    current = _current(section, load, wanted, strict=strict)
    attributions = _attributions(load, current)
    return Decision(
        conditions=section.conditions,
        standings=standings,
        current=current,
        current_apart=next((point for point in section.unranked if matches_conditions(point.samples[0], wanted)), None),
        current_named=strict,
        attributions=attributions,
        additions=find_added_phases(section.ranked, {attribution.slower for attribution in attributions}),
        phases=main_phases(load.leader) if load.leader else [],
        room=_headroom(load.leader),
        pareto=pareto,
        best_at_all=best_at_all,
        apart=[point for point in section.unranked if point.excluded],
        failing=[point for point in section.ranked if point.problems],
        dtypes=_dtypes([*load.best, *load.others]),
    )


def _dtypes(points: Sequence[PointFigures]) -> dict[str, list[PointFigures]]:
    """Return the points by the dtype that their loads end with, in the order given; empty where all end alike."""
    found: dict[str, list[PointFigures]] = {}
    for point in points:
        found.setdefault(ends_of(point)[0], []).append(point)
    return found if len(found) > 1 else {}


def _current(section: Section, load: Standing, wanted: Sequence[Condition], *, strict: bool) -> Current | None:
    found = [point for point in section.ranked if matches_conditions(point.samples[0], wanted)]
    if len(found) > 1 and strict:
        names = ", ".join(point.name for point in found)
        raise LadezeitError(f"several configurations are the current one ({names}): add a key that tells them apart")
    if len(found) != 1 or load.leader is None:
        return None
    point, leader = found[0], load.leader
    own, best = point.metric_values(LOAD), leader.metric_values(LOAD)
    if point is leader or point in load.best:
        optimal: bool | None = True if load.state in (State.best, State.shared) else None
    else:
        optimal = False if point.rank is not None else None
    others = {str(i): p.metric_values(LOAD) for i, p in enumerate(section.ranked) if p.rank is not None}
    index = str(section.ranked.index(point))
    at = str(section.ranked.index(leader))
    p = compare_against(others, at).get(index) if at in others and index in others else None
    return Current(
        point=point,
        optimal=optimal,
        cost_s=point.spread.median - leader.spread.median if point.spread and leader.spread else None,
        ratio=estimate_ratio(own, best) if point is not leader else None,
        p=p,
    )


def _attributions(load: Standing, current: Current | None) -> list[Attribution]:
    """Explain the current config where it is slower, else the slowest method that significantly is."""
    leader = load.leader
    if leader is None:
        return []
    slower = [point for point in load.others if point.rank is not None]
    chosen = [current.point] if current and current.optimal is False else slower[-1:]
    slowest = slower[-1] if slower else None
    if slowest and slowest not in chosen and slowest.spread and chosen[0].spread:
        chosen += [slowest] if slowest.spread.median > 2 * chosen[0].spread.median else []
    return [explain_difference(point, _fair_rival(point, [*load.best, *load.others], leader)) for point in chosen]


def _fair_rival(point: PointFigures, points: Sequence[PointFigures], leader: PointFigures) -> PointFigures:
    """Return the fastest point that ends with the same dtype and device, if significantly faster; else the leader."""
    same = [
        other
        for other in points
        if other.rank is not None
        and point.rank is not None
        and other.rank < point.rank
        and ends_of(other) == ends_of(point)
    ]
    return same[0] if same else leader


def _headroom(leader: PointFigures | None) -> Headroom | None:
    if leader is None or leader.ceiling_share is None or leader.spread is None:
        return None
    known = [r for r in leader.samples if "load/ceiling_gb_per_s" in r.metrics]
    at_ceiling_s = leader.spread.median * leader.ceiling_share
    return Headroom(
        ceiling=str(known[0].effective.get("ceiling", "machine")),
        gb_per_s=known[0].metrics["load/ceiling_gb_per_s"],
        at_ceiling_s=at_ceiling_s,
        left_s=max(0.0, leader.spread.median - at_ceiling_s),
        share=leader.ceiling_share,
    )


# Several objectives at once: what is best at all of them, or what no other method beats in every respect.


def best_overall(standings: Sequence[Standing]) -> tuple[list[PointFigures], list[PointFigures]]:
    """Return what is among the best at every objective, and, where nothing is, the front that nobody beats throughout.

    Both are empty where fewer than two objectives could be ranked.
    """
    usable = [standing for standing in standings if standing.state in (State.best, State.shared)]
    grades = [_grades(standing) for standing in usable]
    names = [name for name in (grades[0] if grades else {}) if all(name in own for own in grades)]
    if len(usable) < 2:
        return [], []
    by_name = {point.point: point for point in [*usable[0].best, *usable[0].others]}
    common = [by_name[name] for name in names if all(own[name] == 1 for own in grades)]
    front = [
        name
        for name in names
        if not any(_beats([own[rival] for own in grades], [own[name] for own in grades]) for rival in names)
    ]
    return common, [] if common else [by_name[name] for name in front]


def _beats(one: Sequence[int], other: Sequence[int]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def _grades(standing: Standing) -> dict[str, int]:
    """Return the rank of each point; one that is worse than the best by next to nothing shares its rank."""
    leader = standing.leader
    grades = {}
    for point in [*standing.best, *standing.others]:
        if point.rank is not None and point.spread and leader and leader.spread:
            near = abs(point.spread.median - leader.spread.median) <= NEGLIGIBLE * abs(leader.spread.median)
            grades[point.point] = 1 if near else point.rank
    return grades
