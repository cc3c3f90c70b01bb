"""The decision that samples allow: the best method per objective, what the current one costs, how sure that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ladezeit.errors import LadezeitError
from ladezeit.result import Result
from ladezeit.results.attribution import Attribution, attribute, main_phases
from ladezeit.results.comparison import BASELINE, CONDITIONS, PointFigures, Section, compare_points, title_of
from ladezeit.results.objectives import LOAD, OBJECTIVES, Objective
from ladezeit.results.power import samples_to_settle
from ladezeit.results.ranking import against
from ladezeit.results.selection import Condition, matches
from ladezeit.results.statistics import Ratio, ratio, signed_rank

#: A proven difference of less than this share is said to hardly matter, and does not take a point off the Pareto front.
NEGLIGIBLE = 0.01

_MOST_QUESTIONS = 3


class State(Enum):
    """What can be said about an objective."""

    best = "best"  # one method is proven better than every other
    shared = "shared"  # several cannot be told apart, better than the rest
    alone = "alone"  # one method alone has five proven samples
    too_few = "too_few"  # nobody has five proven samples
    absent = "absent"  # no proven sample has the metric


@dataclass(frozen=True)
class Question:
    """What is open between two points: `samples` each would settle it, None: more than a hundred, or not worth it.

    `blocked_p` is that of the test of pairs (same block), where there are six: a hint, never the decision.
    """

    one: str
    other: str
    difference_share: float
    samples: int | None
    blocked_p: float | None


@dataclass(frozen=True)
class Standing:
    """How the methods stand in one objective. `best` share the first rank; `p` is the largest that sets them apart."""

    objective: Objective
    state: State
    best: list[PointFigures]
    others: list[PointFigures]
    p: float | None
    questions: list[Question]

    @property
    def leader(self) -> PointFigures | None:
        """The point with the best median of the first rank, or of all where nobody has a rank."""
        return self.best[0] if self.best else None


@dataclass(frozen=True)
class Current:
    """The config in use, compared with the best: `optimal` is None where it cannot be said.

    `cost_s` is the difference of the load medians, `ratio` that to the best with its interval, `p` Holm-adjusted.
    """

    point: PointFigures
    optimal: bool | None
    cost_s: float | None
    ratio: Ratio | None
    p: float | None


@dataclass(frozen=True)
class Room:
    """What the machine would allow: the load at the binding ceiling, and what the best takes beyond it, in seconds."""

    ceiling: str
    gb_per_s: float
    at_ceiling_s: float
    left_s: float
    share: float


@dataclass(frozen=True)
class Decision:
    """Everything said about one section: points of one model, cache state, process kind and device.

    `current_apart` is the config in use where it is one of those that are not ranked.

    `best_at_all` are among the best in every objective that was measured (two at least); where there are none,
    `pareto` are those that no other beats in every respect.
    """

    conditions: dict[str, str]
    standings: list[Standing]
    current: Current | None
    current_apart: PointFigures | None
    attributions: list[Attribution]
    phases: list[tuple[str, float, float]]
    room: Room | None
    pareto: list[PointFigures]
    best_at_all: list[PointFigures]
    apart: list[PointFigures]
    failing: list[PointFigures] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The conditions in words."""
        return title_of(self.conditions)

    @property
    def load(self) -> Standing:
        """The standing of the load time."""
        return self.standings[0]


def decide(
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
    keys = [key for key in varying if key not in CONDITIONS]
    compared = [compare_points(results, varying, metric=o.metric, baseline=None) for o in OBJECTIVES]
    wanted = current or baseline
    if wanted and not any(matches(result, wanted) for result in results):
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
    standings = [standing(objective, by_objective[objective.name]) for objective in OBJECTIVES]
    load = standings[0]
    current = _current(section, load, wanted, strict=strict)
    return Decision(
        conditions=section.conditions,
        standings=standings,
        current=current,
        current_apart=next((point for point in section.apart if matches(point.samples[0], wanted)), None),
        attributions=_attributions(load, current),
        phases=main_phases(load.leader) if load.leader else [],
        room=_room(load.leader),
        **_together(standings),
        apart=[point for point in section.apart if point.excluded],
        failing=[point for point in section.ranked if point.problems],
    )


def standing(objective: Objective, section: Section) -> Standing:
    """Return how the points of a section stand in `objective`."""
    ranked = [point for point in section.ranked if point.rank is not None]
    few = [point for point in section.ranked if point.rank is None]
    if not section.ranked:
        return Standing(objective, State.absent, [], [], None, [])
    if not ranked:
        return Standing(objective, State.too_few, section.ranked[:1], section.ranked[1:], None, [])
    best = [point for point in ranked if point.rank == 1]
    others = [point for point in ranked if point.rank != 1]
    values = {str(index): point.measured(objective.metric) for index, point in enumerate([*best, *others])}
    chances = against(values, "0")
    beaten = [chances[str(index)] for index in range(len(best), len(values))]
    state = State.alone if len(ranked) == 1 else State.best if len(best) == 1 else State.shared
    questions = [
        _question(best[0], mate, objective.metric, tests=max(1, len(ranked) - 1))
        for mate in best[1 : 1 + _MOST_QUESTIONS]
    ]
    return Standing(objective, state, best, [*others, *few], max(beaten, default=None), questions)


def _question(one: PointFigures, other: PointFigures, metric: str, tests: int) -> Question:
    sides = one.measured(metric), other.measured(metric)
    apart = ratio(sides[1], sides[0])
    blocks = [
        {r.identity.sample: r.metrics[metric] for r in point.samples if metric in r.metrics} for point in (one, other)
    ]
    common = sorted(blocks[0].keys() & blocks[1].keys())
    blocked = signed_rank([blocks[0][b] for b in common], [blocks[1][b] for b in common]) if common else None
    share = apart.estimate - 1 if apart else 0.0
    worth = apart is not None and abs(share) >= NEGLIGIBLE
    return Question(one.name, other.name, share, samples_to_settle(*sides, tests) if worth else None, blocked)


def _current(section: Section, load: Standing, wanted: Sequence[Condition], *, strict: bool) -> Current | None:
    found = [point for point in section.ranked if matches(point.samples[0], wanted)]
    if len(found) > 1 and strict:
        names = ", ".join(point.name for point in found)
        raise LadezeitError(f"several points are the current config ({names}): add a key that tells them apart")
    if len(found) != 1 or load.leader is None:
        return None
    point, leader = found[0], load.leader
    own, best = point.measured(LOAD), leader.measured(LOAD)
    if point is leader or point in load.best:
        optimal: bool | None = True if load.state in (State.best, State.shared) else None
    else:
        optimal = False if point.rank is not None else None
    others = {str(i): p.measured(LOAD) for i, p in enumerate(section.ranked) if p.rank is not None}
    index = str(section.ranked.index(point))
    at = str(section.ranked.index(leader))
    p = against(others, at).get(index) if at in others and index in others else None
    return Current(
        point=point,
        optimal=optimal,
        cost_s=point.spread.median - leader.spread.median if point.spread and leader.spread else None,
        ratio=ratio(own, best) if point is not leader else None,
        p=p,
    )


def _attributions(load: Standing, current: Current | None) -> list[Attribution]:
    """Explain the current config where it is slower, else the slowest method that is proven to be."""
    leader = load.leader
    if leader is None:
        return []
    slower = [point for point in load.others if point.rank is not None]
    chosen = [current.point] if current and current.optimal is False else slower[-1:]
    slowest = slower[-1] if slower else None
    if slowest and slowest not in chosen and slowest.spread and chosen[0].spread:
        chosen += [slowest] if slowest.spread.median > 2 * chosen[0].spread.median else []
    return [attribute(point, _fair_rival(point, [*load.best, *load.others], leader)) for point in chosen]


def _fair_rival(point: PointFigures, points: Sequence[PointFigures], leader: PointFigures) -> PointFigures:
    """Return the fastest point that ends with the same dtype and device, if it is proven faster; else the leader."""
    same = [
        other
        for other in points
        if other.rank is not None
        and point.rank is not None
        and other.rank < point.rank
        and _ends(other) == _ends(point)
    ]
    return same[0] if same else leader


def _ends(point: PointFigures) -> tuple[str, ...]:
    return tuple(str(point.samples[0].effective.get(key)) for key in ("dtype", "device"))


def _room(leader: PointFigures | None) -> Room | None:
    if leader is None or leader.ceiling_share is None or leader.spread is None:
        return None
    known = [r for r in leader.samples if "load/ceiling_gb_per_s" in r.metrics]
    at_ceiling_s = leader.spread.median * leader.ceiling_share
    return Room(
        ceiling=str(known[0].effective.get("ceiling", "machine")),
        gb_per_s=known[0].metrics["load/ceiling_gb_per_s"],
        at_ceiling_s=at_ceiling_s,
        left_s=max(0.0, leader.spread.median - at_ceiling_s),
        share=leader.ceiling_share,
    )


def _together(standings: Sequence[Standing]) -> dict[str, list[PointFigures]]:
    """Return what is best at every objective, or the front of what no other point beats throughout."""
    usable = [standing for standing in standings if standing.state in (State.best, State.shared)]
    grades = [_grades(standing) for standing in usable]
    names = [name for name in (grades[0] if grades else {}) if all(name in own for own in grades)]
    if len(usable) < 2:
        return {"best_at_all": [], "pareto": []}
    by_name = {point.point: point for point in [*usable[0].best, *usable[0].others]}
    common = [by_name[name] for name in names if all(own[name] == 1 for own in grades)]
    front = [
        name
        for name in names
        if not any(_beats([own[rival] for own in grades], [own[name] for own in grades]) for rival in names)
    ]
    return {"best_at_all": common, "pareto": [] if common else [by_name[name] for name in front]}


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
