"""The verdict as one JSON document, for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ladezeit.results import advice
from ladezeit.results.attribution import Attribution
from ladezeit.results.comparison import PointFigures
from ladezeit.results.decision import Decision
from ladezeit.results.standing import Standing
from ladezeit.results.statistics import Ratio
from ladezeit.results.verdict_words import answer


def as_document(decisions: Sequence[Decision], notes: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return the verdict as plain data; `more` is added at the top (what was read)."""
    return {**more, "notes": list(notes), "decisions": [_decision(decision, decisions) for decision in decisions]}


def _decision(decision: Decision, decisions: Sequence[Decision]) -> dict[str, Any]:
    current, room = decision.current, decision.room
    return {
        "conditions": decision.conditions,
        "answer": answer(decision),
        "objectives": {standing.objective.name: _standing(standing) for standing in decision.standings},
        "best_at_all": [point.name for point in decision.best_at_all],
        "pareto": [point.name for point in decision.pareto],
        "current": current
        and {
            "name": current.point.name,
            "optimal": current.optimal,
            "cost_s": current.cost_s,
            "ratio": _ratio(current.ratio),
            "p_holm": current.p,
        },
        "current_not_ranked": decision.current_apart
        and {"name": decision.current_apart.name, "reason": decision.current_apart.excluded},
        "where_the_time_goes": [_attribution(attribution) for attribution in decision.attributions],
        "additions": decision.additions,
        "best_phases": [{"path": path, "self_s": own_s, "share": share} for path, own_s, share in decision.phases],
        "ceiling": room and asdict(room),
        "what_to_do": advice.as_plain(advice.steps(decision, decisions)),
        "not_ranked": [{"name": point.name, "reason": point.excluded} for point in decision.apart],
        "failing": [{"name": point.name, "problems": point.problems} for point in decision.failing],
    }


def _standing(standing: Standing) -> dict[str, Any]:
    return {
        "metric": standing.objective.metric,
        "unit": standing.objective.unit,
        "state": standing.state.value,
        "best": [_point(point) for point in standing.best],
        "others": [_point(point) for point in standing.others],
        "largest_p_holm": standing.p,
        "open_questions": [asdict(question) for question in standing.questions],
    }


def _point(point: PointFigures) -> dict[str, Any]:
    spread = point.spread
    known: Mapping[str, Any] = {"name": point.name, "values": point.values, "point": point.point, "rank": point.rank}
    return {**known, **(asdict(spread) if spread else {}), "proof": point.level}


def _ratio(ratio: Ratio | None) -> dict[str, float] | None:
    return {"estimate": ratio.estimate, **asdict(ratio.interval)} if ratio else None


def _attribution(attribution: Attribution) -> dict[str, Any]:
    return {
        "slower": attribution.slower,
        "faster": attribution.faster,
        "medians_s": list(attribution.difference.medians_s),
        "phases": [asdict(phase) for phase in attribution.difference.phases],
        "differing_settings": {key: list(pair) for key, pair in attribution.settings.items()},
        "sentences": attribution.sentences,
    }
