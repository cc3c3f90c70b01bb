"""A check in words for people, and as one JSON document for programs."""

import json
from typing import Any

from ladezeit.results.objectives import figure, more_is_better, unit_of
from ladezeit.results.power import MOST_SAMPLES
from ladezeit.results.regression.judging import Check, Outcome, PointCheck
from ladezeit.results.statistics import LEVEL

_TITLES = {
    Outcome.slower: "SLOWER",
    Outcome.broken: "BROKEN",
    Outcome.missing: "MISSING",
    Outcome.undecided: "undecided",
    Outcome.within: "within",
    Outcome.new: "new",
    Outcome.unproven_before: "unproven",
}

_SUMMARY = {
    Outcome.slower: "slower than allowed",
    Outcome.broken: "no longer proven",
    Outcome.missing: "missing",
    Outcome.undecided: "undecided",
    Outcome.within: "within the limit",
    Outcome.new: "new",
    Outcome.unproven_before: "not proven in the baseline",
}


def as_text(checked: Check) -> str:
    """Return the check as lines: the points by their conditions, what closes the gate first, and the answer last."""
    lines: list[str] = []
    width = max(len(point.name) for point in checked.points)
    for title in dict.fromkeys(point.title for point in checked.points):
        lines += [title, *_lines(checked, title, width), ""]
    return "\n".join([*lines, answer(checked)])


def _lines(checked: Check, title: str, width: int) -> list[str]:
    lines = []
    for point in (point for point in checked.points if point.title == title):
        lines.append(f"  {_TITLES[point.outcome]:<9}  {point.name:<{width}}  {sentence(point, checked)}")
        lines += [f"  {'':<9}  {'':<{width}}  ({note})" for note in point.notes]
    return lines


def sentence(point: PointCheck, checked: Check) -> str:
    """Return what became of a point, with its figures, in one line."""
    if point.ratio is None:
        more = f" ({point.samples} samples of each are the least)" if point.samples else ""
        return point.reason + more
    unit = unit_of(checked.metric)
    ratio, interval = point.ratio.estimate, point.ratio.interval
    how = "times less" if more_is_better(checked.metric) else "times as long" if unit == "s" else "times as much"
    figures = (
        f"{figure(point.now, checked.metric)} {unit}, was {figure(point.before, checked.metric)} {unit}: "
        f"{ratio:.3g} {how} ({interval.low:.3g} to {interval.high:.3g} in the {interval.coverage:.1%} interval)"
    )
    return f"{figures}; {point.reason}{_settled_by(point)}"


def _settled_by(point: PointCheck) -> str:
    if point.outcome is not Outcome.undecided:
        return ""
    if point.samples is None:
        return f"; more than {MOST_SAMPLES} samples of each would be needed to settle it"
    return f"; about {point.samples} samples of each would settle it"


def answer(checked: Check) -> str:
    """Return the answer in one line: ``passed`` or ``FAILED``, and how many points ended how."""
    counts = [f"{count} {_SUMMARY[outcome]}" for outcome in Outcome if (count := checked.count(outcome))]
    head = "FAILED" if checked.failing else "passed"
    return f"{head}: {', '.join(counts)} ({checked.metric}, {100 * checked.limit:.4g} % slower allowed)"


def as_document(checked: Check, **more: Any) -> str:
    """Return one JSON document with every figure unrounded; `more` is added at the top (what was read)."""
    document = {
        **more,
        "passed": not checked.failing,
        "answer": answer(checked),
        "metric": checked.metric,
        "unit": unit_of(checked.metric),
        "max_slowdown": checked.limit,
        "level": LEVEL,
        "missing_allowed": checked.allow_missing,
        "counts": {outcome.value: checked.count(outcome) for outcome in Outcome},
        "points": [_plain(point, checked) for point in checked.points],
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def _plain(point: PointCheck, checked: Check) -> dict[str, Any]:
    interval = point.ratio.interval if point.ratio else None
    return {
        "conditions": point.conditions,
        "name": point.name,
        "outcome": point.outcome.value,
        "failing": point in checked.failing,
        "reason": point.reason,
        "n_before": point.n_before,
        "n_now": point.n_now,
        "median_before": point.before,
        "median_now": point.now,
        "ratio": point.ratio.estimate if point.ratio else None,
        "ratio_low": interval.low if interval else None,
        "ratio_high": interval.high if interval else None,
        "ratio_coverage": interval.coverage if interval else None,
        "p_holm": point.p,
        "samples_to_settle": point.samples,
        "notes": point.notes,
    }
