"""The verdict in words, as Markdown: the answer first, then what it rests on."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ladezeit.analysis import recommendations
from ladezeit.analysis.attribution import Attribution
from ladezeit.analysis.comparison import BASELINE, PointFigures
from ladezeit.analysis.decision import Current, Decision
from ladezeit.analysis.eligibility import claim_of, format_value
from ladezeit.analysis.recommendations import recommend_steps
from ladezeit.analysis.standing import NEGLIGIBLE, Standing, State
from ladezeit.analysis.statistics import LEAST_TO_RANK, LEVEL, Ratio, samples_needed
from ladezeit.errors import LadezeitError
from ladezeit.report.comparison_table import apart_text_of, p_said, truncate_text
from ladezeit.report.sweep_table import sweep_as_markdown
from ladezeit.results.fields import matches_conditions
from ladezeit.results.format import format_seconds
from ladezeit.results.records import Result

_MOST_NAMES = 4

_MOST_LINES = 24


def as_markdown(decisions: Sequence[Decision], notes: Sequence[str], head: str) -> str:
    """Return the whole verdict; `head` says what was read (sweep, machine, counts)."""
    parts = [f"# Verdict\n\n{head}"]
    if len(decisions) > 1:
        parts.append("\n".join(f"- **{decision.title}**: {describe_answer(decision)}" for decision in decisions))
    for decision in decisions:
        parts.append(f"## {decision.title}")
        parts += describe_section(decision, decisions)
    parts += [f"Note: {note}." for note in notes]
    return "\n\n".join(part for part in parts if part) + "\n"


def describe_answer(decision: Decision) -> str:
    """Return the answer for a section in one sentence: which method loads fastest, or why that cannot be said."""
    load = decision.load
    leader = load.leader
    if leader is None or leader.spread is None:
        return "nothing can be said: no method has a verified sample."
    took = f"{format_seconds(leader.spread.median)} s"
    if load.state is State.best:
        significance = f"({p_said(load.p, '≤')}, Holm-adjusted)"
        return (
            f"load with `{leader.name}` ({took}): significantly faster than {_all_others(load)} {significance}."
            f"{_against_baseline(decision)}{_unlike_dtypes(decision)}"
        )
    if load.state is State.shared and (needed := _samples_wanting(load)):
        return (
            f"undecided: {len(load.best) + len(load.others)} methods need at least {needed} samples each to be told "
            f"apart, and there are {leader.spread.n}. So far `{leader.name}` has the best median ({took})."
        )
    if load.state is State.shared:
        beaten = [point for point in load.others if point.rank is not None]
        rest = f" `{leader.name}` is significantly faster than {_names(beaten)}." if beaten else ""
        medians = [point.spread.median for point in load.best if point.spread]
        span = f"medians {format_seconds(min(medians))} to {format_seconds(max(medians))} s"
        return f"{_names(load.best)} are not distinguishable ({span}).{rest}{_unlike_dtypes(decision)}"
    if load.state is State.alone:
        return f"`{leader.name}` ({took}) is the only method with enough verified samples: there is nothing to compare."
    return (
        f"undecided: fewer than {LEAST_TO_RANK} samples per configuration. So far `{leader.name}` has the best median "
        f"({took}, n = {leader.spread.n})."
    )


def _against_baseline(decision: Decision) -> str:
    """Return how many times the baseline's time the best one takes, where that is significant."""
    current, leader = decision.current, decision.load.leader
    if leader is None or current is None or current.point is leader or leader.ratio is None:
        return ""
    if leader.p is None or leader.p >= LEVEL or not matches_conditions(current.point.samples[0], BASELINE):
        return ""
    within = leader.ratio.interval
    times = f"{leader.ratio.estimate:.3g} times as long as `{current.point.name}`"
    return f" Pairwise it takes {times} ({within.low:.3g} to {within.high:.3g})."


def _unlike_dtypes(decision: Decision) -> str:
    """Say which methods end with which dtype, the fastest first, where that differs: theirs is not the same work."""
    if not decision.dtypes:
        return ""
    best = [
        f"{dtype}: `{points[0].name}` ({format_seconds(points[0].spread.median)} s)"
        for dtype, points in decision.dtypes.items()
        if points[0].spread
    ]
    return f" Not all end with the same dtype; the fastest of each is {'; '.join(best)}."


def _samples_wanting(load: Standing) -> int | None:
    """Return how many samples a point needs, where so few were taken that no difference could be significant."""
    points = [point for point in [*load.best, *load.others] if point.rank is not None and point.spread]
    needed = samples_needed(len(points))
    return needed if all(point.spread is not None and point.spread.n < needed for point in points) else None


def in_short(decisions: Sequence[Decision]) -> list[str]:
    """Return the verdict as lines: the answer of each section, then where the time of its slower methods goes."""
    lines = []
    for decision in decisions:
        about = f"{decision.title}: " if len(decisions) > 1 else ""
        lines.append(f"{about}{describe_answer(decision) if about else _capital(describe_answer(decision))}")
        lines += [" ".join(attribution.sentences) for attribution in decision.attributions]
        lines += decision.additions
    return lines


def describe_section(decision: Decision, decisions: Sequence[Decision]) -> list[str]:
    """Return the paragraphs about one of `decisions`, without a heading of their own; subheadings have three signs."""
    parts = [f"**{_capital(describe_answer(decision))}**"]
    if decision.current and decision.load.leader:
        parts.append(_current(_role(decision), decision.current, decision.load))
    if distrusted := decision.current_apart:
        parts.append(
            f"The {_role(decision)}, `{distrusted.name}`, **is not ranked**: "
            f"{truncate_text(distrusted.excluded or '')}."
        )
    parts.append(_objectives(decision))
    if decision.best_at_all and len(decision.best_at_all) < len([*decision.load.best, *decision.load.others]):
        parts.append(f"Among the best at all of these: {_names(decision.best_at_all)}.")
    if decision.pareto:
        names = "; ".join(f"`{point.name}`" for point in decision.pareto)
        parts.append(f"No method is best at everything. None of these is beaten in every respect: {names}.")
    if where := _where(decision):
        parts.append("### Where the time goes\n\n" + where)
    todo = recommend_steps(decision, decisions)
    if todo:
        lines = [f"{number}. {step.text}." for number, step in enumerate(todo, 1)]
        parts.append("### What to do, largest gain first\n\n" + "\n".join(lines))
    parts.append("### How sure this is, and what would settle the rest\n\n" + _how_sure(decision))
    if decision.apart:
        lines = [f"- `{point.name}`: {apart_text_of(point, 'load/total_s')}" for point in decision.apart]
        parts.append("### Not ranked\n\n" + "\n".join(lines))
    return parts


def _role(decision: Decision) -> str:
    """Return what the config that all is compared with is: nobody calls current what its user did not."""
    return "current config" if decision.current_named else "baseline"


def _current(role: str, current: Current, load: Standing) -> str:
    name = f"The {role}, `{current.point.name}`,"
    spread, leader = current.point.spread, load.leader
    if spread is None or leader is None:
        return ""
    if current.optimal:
        if load.state is State.best:
            return f"{name} **is the best one: nothing to change.**"
        said = f"{name} **is already optimal as far as can be told**: no method is significantly faster."
        if current.ratio:
            said += f" Its time over that of `{leader.name}`: {_range(current.ratio)}."
        return said
    if current.optimal is None:
        return f"{name} cannot be judged yet: it, or the method it is compared with, has too few verified samples."
    times = f", {current.ratio.estimate:.3g} times as long, pairwise ({_range(current.ratio)})" if current.ratio else ""
    significance = f"{p_said(current.p)} (Holm-adjusted)"
    cost = f"{name} **costs {format_seconds(current.cost_s)} s more per load**{times}, {significance}."
    if (current.cost_s or 0.0) < NEGLIGIBLE * spread.median:
        cost += " That is significant, but hardly matters."
    return cost


def _range(found: Ratio) -> str:
    within = found.interval
    return f"{within.low:.3g} to {within.high:.3g} in the {100 * within.coverage:.1f} % interval"


def _objectives(decision: Decision) -> str:
    absent: list[str] = []
    lines = ["| objective | best | median | interval | significantly better than |", "| :-- | :-- | --: | --: | :-- |"]
    for standing in decision.standings:
        title = standing.objective.title
        leader = standing.leader
        if leader is None or leader.spread is None:
            absent.append(f"{title} ({standing.objective.absent})")
            continue
        metric, unit = standing.objective.metric, standing.objective.unit
        within = leader.spread.interval
        best = ", ".join(point.name for point in standing.best[:_MOST_NAMES])
        if len(standing.best) > 1:
            rest = standing.others or len(standing.best) <= _MOST_NAMES // 2
            best = f"{best} ({len(standing.best)} alike)" if rest else f"all {len(standing.best)} alike"
        beaten = [point.name for point in standing.beaten]
        better = ", ".join(beaten[:_MOST_NAMES]) or "–"
        better += f" and {len(beaten) - _MOST_NAMES} more" if len(beaten) > _MOST_NAMES else ""
        if standing.state is State.too_few:
            better = f"too few samples (n = {leader.spread.n})"
        lines.append(
            f"| {title} | {best} | {format_value(leader.spread.median, metric)} {unit} | "
            f"{format_value(within.low, metric)}–{format_value(within.high, metric)} | {better} |"
        )
    said = [] if len(lines) == 2 else ["\n".join(lines)]
    said += [f"Not measured: {'; '.join(absent)}."] if absent else []
    return "\n\n".join(said)


def _where(decision: Decision) -> str:
    lines = [f"- {' '.join(attribution.sentences)}" for attribution in decision.attributions]
    lines += [f"- {addition}" for addition in decision.additions]
    leader = decision.load.leader
    if leader and decision.phases:
        spent = ", ".join(
            f"{path} {format_seconds(own_s)} s ({100 * share:.0f} %)" for path, own_s, share in decision.phases
        )
        lines.append(f"- The best, {leader.name}, spends its time in {spent}.")
    room = decision.room
    if room:
        lines.append(
            f"- At the machine's limit ({room.ceiling}, {room.gb_per_s:.3g} GB/s) this load would take "
            f"{format_seconds(room.at_ceiling_s)} s: {format_seconds(room.left_s)} s is all that any method could "
            f"still gain."
        )
    return "\n".join(lines)


def _how_sure(decision: Decision) -> str:
    load = decision.load
    points = [point for point in [*load.best, *load.others] if point.spread]
    sizes = sorted({point.spread.n for point in points if point.spread})
    if not sizes or load.leader is None or load.leader.spread is None:
        return "There is no verified sample."
    n = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    lines = [
        f"- {n} samples per configuration, each in its own process; the intervals above cover the true median with "
        f"a probability of {100 * load.leader.spread.interval.coverage:.1f} %."
    ]
    ranked = sum(point.rank is not None for point in points)
    if load.state in (State.best, State.shared):
        lines.append(
            f"- Exact Mann-Whitney tests against the best, Holm-adjusted over {max(1, ranked - 1)}; p < {LEVEL} counts "
            f"as significant. If all methods are equally good, at most 5 % of such sweeps declare one of them the best."
        )
    needed = samples_needed(len(points))
    if LEAST_TO_RANK <= sizes[0] < needed:
        lines.append(
            f"- {len(points)} methods cannot be told apart with fewer than {needed} samples each "
            f"(sample=range({needed}))."
        )
    for question in load.questions:
        said = (
            f"- `{question.one}` and `{question.other}`: not distinguishable ({100 * question.difference_share:+.1f} %)"
        )
        if question.samples:
            said += f"; about {question.samples} samples each would settle it."
        elif abs(question.difference_share) < NEGLIGIBLE:
            said += "; the difference is too small to matter."
        else:
            said += "; more than 100 samples would be needed."
        if question.blocked_p is not None and question.blocked_p < LEVEL:
            said += f" (Block by block they do differ, {p_said(question.blocked_p)}, unadjusted: worth more samples.)"
        lines.append(said)
    lines += _claims(points)
    for point in decision.failing:
        lines.append(
            f"- `{point.name}` is ranked by its good samples, but: "
            f"{'; '.join(truncate_text(p) for p in point.problems)}"
        )
    few = [p for p in load.others if p.rank is None and p.spread and p.spread.median < load.leader.spread.median]
    if few and load.state is not State.too_few:
        lines.append(f"- {_names(few)} may be faster, but fewer than {LEAST_TO_RANK} samples are too few to tell.")
    return "\n".join(lines)


def _claims(points: Sequence[PointFigures]) -> list[str]:
    """Return a line for each guarantee about models that are quantized or split."""
    by_claim: dict[str, list[PointFigures]] = {}
    for point in points:
        if claim := claim_of(point.samples):
            by_claim.setdefault(claim, []).append(point)
    return [f"- What was verified of {_names(own)}: {claim}." for claim, own in by_claim.items()]


def _all_others(load: Standing) -> str:
    beaten = [point for point in load.others if point.rank is not None]
    return f"{_names(beaten)}" if len(beaten) <= _MOST_NAMES else f"all {len(beaten)} others"


def _names(points: Sequence[PointFigures]) -> str:
    names = [f"`{point.name}`" for point in points]
    if len(names) > _MOST_NAMES:
        return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# The verdict as one JSON document, for programs.


def as_document(decisions: Sequence[Decision], notes: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return the verdict as plain data; `more` is added at the top (what was read)."""
    return {**more, "notes": list(notes), "decisions": [_decision(decision, decisions) for decision in decisions]}


def _decision(decision: Decision, decisions: Sequence[Decision]) -> dict[str, Any]:
    current, room = decision.current, decision.room
    return {
        "conditions": decision.conditions,
        "answer": describe_answer(decision),
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
        "what_to_do": recommendations.as_plain(recommendations.recommend_steps(decision, decisions)),
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


# What a sweep says at its end, in the terminal and in MLflow: the verdict in short, then the table.


def closing_words(results: Sequence[Result], varying: Sequence[str]) -> list[str]:
    """Return the verdict in a few lines of Markdown: what is best in each section, and where the others' time goes."""
    from ladezeit.analysis.decision import decide_methods
    from ladezeit.results.fields import infer_varying_keys

    declared = [key for key in varying if key != "sample"]
    try:
        decisions, _ = decide_methods(results, infer_varying_keys(results, declared))
    except LadezeitError as error:
        return [f"There is no verdict: {error}."]
    lines = in_short(decisions)
    more = len(lines) - _MOST_LINES
    return lines[:_MOST_LINES] + ([f"… and {more} more lines in the report"] if more > 0 else [])


def summarize_sweep(results: Sequence[Result], varying: Sequence[str]) -> str:
    """Return the closing words and the table of all configurations as Markdown."""
    words = "\n".join(f"- {line}" for line in closing_words(results, varying))
    return f"{words}\n\n{sweep_as_markdown(results, varying)}"
