"""The verdict in words, as Markdown: the answer first, then what it rests on."""

from collections.abc import Sequence

from ladezeit.results.advice import steps
from ladezeit.results.comparison import PointFigures
from ladezeit.results.comparison_table import apart_text_of, cut, p_text
from ladezeit.results.decision import Current, Decision
from ladezeit.results.objectives import figure
from ladezeit.results.proven import claim_of
from ladezeit.results.ranking import samples_needed
from ladezeit.results.seconds import seconds
from ladezeit.results.standing import NEGLIGIBLE, Standing, State
from ladezeit.results.statistics import LEAST_TO_RANK, LEVEL, Ratio

_MOST_NAMES = 4


def as_markdown(decisions: Sequence[Decision], notes: Sequence[str], head: str) -> str:
    """Return the whole verdict; `head` says what was read (sweep, machine, counts)."""
    parts = [f"# Verdict\n\n{head}"]
    if len(decisions) > 1:
        parts.append("\n".join(f"- **{decision.title}**: {answer(decision)}" for decision in decisions))
    for decision in decisions:
        parts.append(f"## {decision.title}")
        parts += section(decision, decisions)
    parts += [f"Note: {note}." for note in notes]
    return "\n\n".join(part for part in parts if part) + "\n"


def answer(decision: Decision) -> str:
    """Return the answer for a section in one sentence: which method loads fastest, or why that cannot be said."""
    load = decision.load
    leader = load.leader
    if leader is None or leader.spread is None:
        return "nothing can be said: no method has a proven sample."
    took = f"{seconds(leader.spread.median)} s"
    if load.state is State.best:
        return f"load with `{leader.name}` ({took}): proven faster than {_all_others(load)}, p ≤ {p_text(load.p)}."
    if load.state is State.shared and (needed := _samples_wanting(load)):
        return (
            f"undecided: {len(load.best) + len(load.others)} methods need at least {needed} samples each to be told "
            f"apart, and there are {leader.spread.n}. So far `{leader.name}` has the best median ({took})."
        )
    if load.state is State.shared:
        beaten = [point for point in load.others if point.rank is not None]
        rest = f" `{leader.name}` is proven faster than {_names(beaten)}." if beaten else ""
        medians = [point.spread.median for point in load.best if point.spread]
        span = f"medians {seconds(min(medians))} to {seconds(max(medians))} s"
        return f"{_names(load.best)} are not distinguishable ({span}).{rest}"
    if load.state is State.alone:
        return (
            f"`{leader.name}` ({took}) is the only method with enough proven samples: there is nothing to choose from."
        )
    return (
        f"undecided: fewer than {LEAST_TO_RANK} samples a point. So far `{leader.name}` has the best median ({took}, "
        f"n = {leader.spread.n})."
    )


def _samples_wanting(load: Standing) -> int | None:
    """Return how many samples a point needs, where so few were taken that no difference at all could be proven."""
    points = [point for point in [*load.best, *load.others] if point.rank is not None and point.spread]
    needed = samples_needed(len(points))
    return needed if all(point.spread is not None and point.spread.n < needed for point in points) else None


def in_short(decisions: Sequence[Decision]) -> list[str]:
    """Return the verdict as lines: the answer of each section, then where the time of its slower methods goes."""
    lines = []
    for decision in decisions:
        about = f"{decision.title}: " if len(decisions) > 1 else ""
        lines.append(f"{about}{answer(decision) if about else _capital(answer(decision))}")
        lines += [" ".join(attribution.sentences) for attribution in decision.attributions]
        lines += decision.additions
    return lines


def section(decision: Decision, decisions: Sequence[Decision]) -> list[str]:
    """Return the paragraphs about one of `decisions`, without a heading of their own; subheadings have three signs."""
    parts = [f"**{_capital(answer(decision))}**"]
    if decision.current and decision.load.leader:
        parts.append(_current(decision.current, decision.load))
    if distrusted := decision.current_apart:
        parts.append(f"The current config, `{distrusted.name}`, **is not ranked**: {cut(distrusted.excluded or '')}.")
    parts.append(_objectives(decision))
    if decision.best_at_all and len(decision.best_at_all) < len([*decision.load.best, *decision.load.others]):
        parts.append(f"Among the best at all of these: {_names(decision.best_at_all)}.")
    if decision.pareto:
        names = "; ".join(f"`{point.name}`" for point in decision.pareto)
        parts.append(f"No method is best at everything. None of these is beaten in every respect: {names}.")
    if where := _where(decision):
        parts.append("### Where the time goes\n\n" + where)
    todo = steps(decision, decisions)
    if todo:
        lines = [f"{number}. {step.text}." for number, step in enumerate(todo, 1)]
        parts.append("### What to do, largest gain first\n\n" + "\n".join(lines))
    parts.append("### How sure this is, and what would settle the rest\n\n" + _how_sure(decision))
    if decision.apart:
        lines = [f"- `{point.name}`: {apart_text_of(point, 'load/total_s')}" for point in decision.apart]
        parts.append("### Not ranked\n\n" + "\n".join(lines))
    return parts


def _current(current: Current, load: Standing) -> str:
    name = f"The current config, `{current.point.name}`,"
    spread, leader = current.point.spread, load.leader
    if spread is None or leader is None:
        return ""
    if current.optimal:
        if load.state is State.best:
            return f"{name} **is the best one: nothing to change.**"
        said = f"{name} **is already optimal as far as can be told**: no method is proven faster."
        if current.ratio:
            said += f" Its time over that of `{leader.name}`: {_range(current.ratio)}."
        return said
    if current.optimal is None:
        return f"{name} cannot be judged yet: it, or what it is compared with, has too few proven samples."
    times = f", {current.ratio.estimate:.3g} times as long ({_range(current.ratio)})" if current.ratio else ""
    cost = f"{name} **costs {seconds(current.cost_s)} s more a load**{times}, p = {p_text(current.p)}."
    if (current.cost_s or 0.0) < NEGLIGIBLE * spread.median:
        cost += " That is proven, and hardly matters."
    return cost


def _range(found: Ratio) -> str:
    within = found.interval
    return f"{within.low:.3g} to {within.high:.3g} in the {100 * within.coverage:.1f} % interval"


def _objectives(decision: Decision) -> str:
    absent: list[str] = []
    lines = ["| objective | best | median | interval | proven better than |", "| :-- | :-- | --: | --: | :-- |"]
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
        beaten = [point.name for point in standing.others if point.rank is not None]
        better = ", ".join(beaten[:_MOST_NAMES]) or "–"
        better += f" and {len(beaten) - _MOST_NAMES} more" if len(beaten) > _MOST_NAMES else ""
        if standing.state is State.too_few:
            better = f"too few samples (n = {leader.spread.n})"
        lines.append(
            f"| {title} | {best} | {figure(leader.spread.median, metric)} {unit} | "
            f"{figure(within.low, metric)}–{figure(within.high, metric)} | {better} |"
        )
    said = [] if len(lines) == 2 else ["\n".join(lines)]
    said += [f"Not measured: {'; '.join(absent)}."] if absent else []
    return "\n\n".join(said)


def _where(decision: Decision) -> str:
    lines = [f"- {' '.join(attribution.sentences)}" for attribution in decision.attributions]
    lines += [f"- {addition}" for addition in decision.additions]
    leader = decision.load.leader
    if leader and decision.phases:
        spent = ", ".join(f"{path} {seconds(own_s)} s ({100 * share:.0f} %)" for path, own_s, share in decision.phases)
        lines.append(f"- The best, {leader.name}, spends its time in {spent}.")
    room = decision.room
    if room:
        lines.append(
            f"- At the machine's limit ({room.ceiling}, {room.gb_per_s:.3g} GB/s) this load would take "
            f"{seconds(room.at_ceiling_s)} s: {seconds(room.left_s)} s is all that any method could still gain."
        )
    return "\n".join(lines)


def _how_sure(decision: Decision) -> str:
    load = decision.load
    points = [point for point in [*load.best, *load.others] if point.spread]
    sizes = sorted({point.spread.n for point in points if point.spread})
    if not sizes or load.leader is None or load.leader.spread is None:
        return "There is no proven sample."
    n = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    lines = [
        f"- {n} samples a point, each in its own process; the intervals above cover the true median with "
        f"{100 * load.leader.spread.interval.coverage:.1f} %."
    ]
    ranked = sum(point.rank is not None for point in points)
    if load.state in (State.best, State.shared):
        lines.append(
            f"- Exact Mann-Whitney tests against the best, adjusted by Holm over {max(1, ranked - 1)}; below {LEVEL} "
            f"counts as proven. Of equally good methods one is falsely called the best in at most 5 % of such sweeps."
        )
    needed = samples_needed(len(points))
    if LEAST_TO_RANK <= sizes[0] < needed:
        lines.append(
            f"- {len(points)} methods can only be told apart from {needed} samples on (sample=range({needed}))."
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
            said += f" (Block by block they do differ, p = {p_text(question.blocked_p)}: worth more samples.)"
        lines.append(said)
    lines += _claims(points)
    for point in decision.failing:
        lines.append(
            f"- `{point.name}` is ranked by its good samples, but: {'; '.join(cut(p) for p in point.problems)}"
        )
    few = [p for p in load.others if p.rank is None and p.spread and p.spread.median < load.leader.spread.median]
    if few and load.state is not State.too_few:
        lines.append(f"- {_names(few)} may be faster, but with fewer than {LEAST_TO_RANK} samples nobody knows.")
    return "\n".join(lines)


def _claims(points: Sequence[PointFigures]) -> list[str]:
    """Return a line for each thing that is proven of models that are quantised or split."""
    by_claim: dict[str, list[PointFigures]] = {}
    for point in points:
        if claim := claim_of(point.samples):
            by_claim.setdefault(claim, []).append(point)
    return [f"- What is proven of {_names(own)}: {claim}." for claim, own in by_claim.items()]


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
