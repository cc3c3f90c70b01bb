"""What to do, in order of gain: every step with what it saves and what that rests on."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ladezeit.analysis.attribution import UNATTRIBUTED, ends_with
from ladezeit.analysis.decision import Decision
from ladezeit.analysis.eligibility import LOAD
from ladezeit.analysis.standing import NEGLIGIBLE, State
from ladezeit.analysis.statistics import LEAST_TO_RANK, LEVEL, mann_whitney
from ladezeit.results.format import format_p, format_seconds
from ladezeit.results.records import Result, Status


@dataclass(frozen=True)
class Step:
    """Something to do: `gain_s` is what it can save a load at most (None: it saves nothing, it settles something)."""

    gain_s: float | None
    text: str


def recommend_steps(decision: Decision, others: Sequence[Decision]) -> list[Step]:
    """Return what to do about a section, the largest gain first; what settles a question comes last.

    `others` are the decisions of the same sweep: another cache state of the same model may be the better step.
    """
    found = [*_switch(decision), *_phase_to_cure(decision), *_warm(decision, others), *_imports(decision)]
    found += _collector(decision)
    found.sort(key=lambda step: -(step.gain_s or 0.0))
    return [*found, *_questions(decision)]


def _switch(decision: Decision) -> list[Step]:
    current, leader = decision.current, decision.load.leader
    if current is None or leader is None or current.optimal is not False or not current.cost_s or current.cost_s <= 0:
        return []
    total_s = current.point.spread.median if current.point.spread else 0.0
    if total_s and current.cost_s < NEGLIGIBLE * total_s:
        return []
    text = f"Load with {leader.name} instead of {current.point.name}: saves {share_text(current.cost_s, total_s)}"
    dtypes = [str(ends_with(point.samples[0])["dtype"]) for point in (leader, current.point)]
    if dtypes[0] != dtypes[1]:
        text += f"; mind that it ends with {dtypes[0]}, not {dtypes[1]}"
    return [Step(current.cost_s, text)]


def _phase_to_cure(decision: Decision) -> list[Step]:
    """Return a step for each slow method whose time lies in one phase that a faster one does not have."""
    found = []
    for attribution in decision.attributions:
        for phase in attribution.named[:1]:
            total_s = attribution.difference.medians_s[0]
            if phase.faster_s > 0 or phase.path == UNATTRIBUTED or phase.slower_s < NEGLIGIBLE * total_s:
                continue
            found.append(
                Step(
                    phase.slower_s,
                    f"Where {attribution.slower} has to stay, remove {phase.path} from it, which takes "
                    f"{share_text(phase.slower_s, total_s)}; {attribution.faster} does without it",
                )
            )
    return found


def _warm(decision: Decision, others: Sequence[Decision]) -> list[Step]:
    own, leader = decision.conditions, decision.load.leader
    if own.get("cache") != "cold" or leader is None or leader.spread is None or decision.load.state is State.too_few:
        return []
    for other in others:
        warm = other.load.leader
        same = {**other.conditions, "cache": "cold"} == own
        enough = other.load.state is not State.too_few
        if same and enough and other.conditions.get("cache") == "warm" and warm and warm.spread:
            gain_s = leader.spread.median - warm.spread.median
            p = mann_whitney(leader.metric_values(LOAD), warm.metric_values(LOAD))
            if gain_s > NEGLIGIBLE * leader.spread.median and p < LEVEL:
                saved = f"saves {share_text(gain_s, leader.spread.median)}, {format_p(p)}"
                return [Step(gain_s, f"Keep the checkpoint in the page cache ({warm.name} from warm): {saved}")]
    return []


def _imports(decision: Decision) -> list[Step]:
    leader = decision.load.leader
    if leader is None or decision.conditions.get("process") != "fresh":
        return []
    spent_s = _phase_median(leader.samples, "import")
    start_s = statistics.median([r.metrics.get("cold_start/first_token_s", 0.0) for r in leader.samples] or [0.0])
    if spent_s < NEGLIGIBLE or not start_s:
        return []
    text = (
        f"Import the libraries before the load is asked for: {leader.name} imports for {share_text(spent_s, start_s)} "
        f"between process start and first token"
    )
    return [Step(spent_s, text)]


def _collector(decision: Decision) -> list[Step]:
    """Return a step where the interpreter's walk over all objects takes a good part of a method's load."""
    current = decision.current.point if decision.current is not None else None
    for point in (decision.load.leader, current):
        if point is None or point.spread is None:
            continue
        total_s = point.spread.median
        share = statistics.median([r.metrics.get("load/garbage_collection_share", 0.0) for r in point.samples] or [0.0])
        if share >= NEGLIGIBLE:
            text = (
                f"Call gc.freeze() after all imports, before {point.name} loads: the garbage collector runs for "
                f"{share_text(share * total_s, total_s)} of its load, mostly over objects that will stay. What that "
                f"saves was not measured"
            )
            return [Step(share * total_s, text)]
    return []


def _phase_median(samples: Sequence[Result], path: str) -> float:
    ok = [result for result in samples if result.status is Status.ok]
    spent = [sum(phase.duration_s for phase in result.phases if phase.path == path) for result in ok]
    return statistics.median(spent) if spent else 0.0


def _questions(decision: Decision) -> list[Step]:
    load = decision.load
    if load.state is State.too_few and load.leader and load.leader.spread:
        return [
            Step(
                None,
                f"Measure at least {LEAST_TO_RANK} samples per configuration (sample=range({LEAST_TO_RANK})): "
                f"nothing can be decided from {load.leader.spread.n}",
            )
        ]
    return []


def share_text(gain_s: float, total_s: float) -> str:
    """Return ``4.31 s of 4.79 s (90 %)``."""
    return f"{format_seconds(gain_s)} s of {format_seconds(total_s)} s ({100 * gain_s / total_s:.0f} %)"


def as_plain(found: Sequence[Step]) -> list[Mapping[str, object]]:
    """Return the steps as plain data for JSON."""
    return [{"gain_s": step.gain_s, "text": step.text} for step in found]
