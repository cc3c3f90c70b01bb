"""How the methods of a section stand in one objective: who is best, who shares that, what is open."""

from dataclasses import dataclass
from enum import Enum

from ladezeit.analysis.comparison import PointFigures, Section
from ladezeit.analysis.eligibility import Objective
from ladezeit.analysis.statistics import compare_against, estimate_ratio, samples_to_settle, signed_rank

#: A significant difference of less than this share is said to hardly matter, and takes no point off the Pareto front.
NEGLIGIBLE = 0.01

_MOST_QUESTIONS = 3


class State(Enum):
    """What can be said about an objective."""

    best = "best"  # one method is significantly better than every other
    shared = "shared"  # several cannot be told apart, better than the rest
    alone = "alone"  # one method alone has five verified samples
    too_few = "too_few"  # nobody has five verified samples
    absent = "absent"  # no verified sample has the metric


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

    @property
    def beaten(self) -> list[PointFigures]:
        """The ranked points that are worse by enough to matter: significantly, and by `NEGLIGIBLE` of the best."""
        if self.leader is None or self.leader.spread is None:
            return []
        best = self.leader.spread.median
        return [
            point
            for point in self.others
            if point.rank is not None and point.spread and abs(point.spread.median - best) >= NEGLIGIBLE * abs(best)
        ]


def rank_methods(objective: Objective, section: Section) -> Standing:
    """Return how the points of a section stand in `objective`."""
    ranked = [point for point in section.ranked if point.rank is not None]
    few = [point for point in section.ranked if point.rank is None]
    if not section.ranked:
        return Standing(objective, State.absent, [], [], None, [])
    if not ranked:
        return Standing(objective, State.too_few, section.ranked[:1], section.ranked[1:], None, [])
    best = [point for point in ranked if point.rank == 1]
    others = [point for point in ranked if point.rank != 1]
    values = {str(index): point.metric_values(objective.metric) for index, point in enumerate([*best, *others])}
    chances = compare_against(values, "0")
    beaten = [chances[str(index)] for index in range(len(best), len(values))]
    state = State.alone if len(ranked) == 1 else State.best if len(best) == 1 else State.shared
    questions = [
        _question(best[0], mate, objective.metric, tests=max(1, len(ranked) - 1))
        for mate in best[1 : 1 + _MOST_QUESTIONS]
    ]
    return Standing(objective, state, best, [*others, *few], max(beaten, default=None), questions)


def _question(one: PointFigures, other: PointFigures, metric: str, tests: int) -> Question:
    sides = one.metric_values(metric), other.metric_values(metric)
    apart = estimate_ratio(sides[1], sides[0])
    blocks = [
        {r.identity.sample: r.metrics[metric] for r in point.samples if metric in r.metrics} for point in (one, other)
    ]
    common = sorted(blocks[0].keys() & blocks[1].keys())
    blocked = signed_rank([blocks[0][b] for b in common], [blocks[1][b] for b in common]) if common else None
    share = apart.estimate - 1 if apart else 0.0
    worth = apart is not None and abs(share) >= NEGLIGIBLE
    return Question(one.name, other.name, share, samples_to_settle(*sides, tests) if worth else None, blocked)
