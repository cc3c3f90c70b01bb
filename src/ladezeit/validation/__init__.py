"""What is proven about a loaded model, and what the proof costs: one module a level.

`placement` looks at every tensor for everything that can be seen without reading it; `content` reads every tensor too
and holds it against what the checkpoint says; `logits` listens to the model; `full` is all three. The other levels are
the origin case's: they look for meta tensors, more or less thoroughly, and find nothing else.
"""

from collections.abc import Callable
from dataclasses import replace

from ladezeit.config import ValidationConfig, ValidationLevel
from ladezeit.loading.base import EngineModel
from ladezeit.measure.clock import Clock
from ladezeit.validation import all_modules, origin_rule, placement, sampled
from ladezeit.validation.content import level as content
from ladezeit.validation.faults import BEFORE_LOADING, Fault
from ladezeit.validation.generation import stored_generation_config
from ladezeit.validation.logits import level as logits
from ladezeit.validation.proof import Expected, Finding, Look, Proof
from ladezeit.validation.quantised import spoken_claim

__all__ = ["CLAIMS", "SPAN", "Expected", "Finding", "Proof", "prove", "prove_spoken", "stored_generation_config"]

SPAN = "validation"
LOGITS_SPAN = "validation/logits"

#: Levels that hold contents against a manifest, and those that hold what the model says against a reference.
NEED_MANIFEST = (ValidationLevel.content, ValidationLevel.full)
NEED_REFERENCE = (ValidationLevel.logits, ValidationLevel.full)


def _none(loaded: EngineModel, expected: Expected, config: ValidationConfig) -> Look:
    return Look("nothing was looked at (validation=none)", ran=False)


def _later(loaded: EngineModel, expected: Expected, config: ValidationConfig) -> Look:
    return Look("the model was not asked yet", ran=False)


_LEVELS: dict[ValidationLevel, Callable[[EngineModel, Expected, ValidationConfig], Look]] = {
    ValidationLevel.none: _none,
    ValidationLevel.sampled: sampled.look,
    ValidationLevel.all_modules: all_modules.look,
    ValidationLevel.origin_rule: origin_rule.look,
    ValidationLevel.placement: placement.look,
    ValidationLevel.content: content.look,
    ValidationLevel.logits: _later,
    ValidationLevel.full: content.look,
}

#: What each level finds whatever engine loaded, with what is refused before any load; held to it by the fault bench.
CLAIMS: dict[ValidationLevel, frozenset[Fault]] = {
    ValidationLevel.none: BEFORE_LOADING,
    ValidationLevel.sampled: BEFORE_LOADING | sampled.CLAIMS,
    ValidationLevel.origin_rule: BEFORE_LOADING | origin_rule.CLAIMS,
    ValidationLevel.all_modules: BEFORE_LOADING | all_modules.CLAIMS,
    ValidationLevel.placement: BEFORE_LOADING | placement.CLAIMS,
    ValidationLevel.content: BEFORE_LOADING | content.CLAIMS,
    ValidationLevel.logits: BEFORE_LOADING | logits.CLAIMS,
    ValidationLevel.full: BEFORE_LOADING | content.CLAIMS | logits.CLAIMS,
}


def prove(loaded: EngineModel, expected: Expected, config: ValidationConfig, clock: Clock) -> Proof:
    """Look at `loaded` as far as `config.level` says, inside the span ``validation``; changes nothing in the model.

    What is wrong is in the proof's findings; nothing is raised for it. What the model says is proven by `prove_spoken`.
    """
    with clock.span(SPAN):
        look = _LEVELS[config.level](loaded, expected, config)
    return Proof(
        level=config.level.value,
        passed=look.ran and not look.findings,
        ran=look.ran,
        reason=look.reason(),
        modules_seen=look.modules_seen,
        tensors_seen=look.tensors_seen,
        findings=look.findings,
        total_s=clock.phases[-1].duration_s,
        metrics=look.metrics,
        claim=look.meaning if look.ran and not look.findings else None,
    )


def prove_spoken(loaded: EngineModel, expected: Expected, before: Proof, clock: Clock) -> Proof:
    """Return `before` with what the model says proven too, inside a span of its own, where its level asks for that.

    Call it after the measured first tokens: they must meet the model as its load left it.
    """
    if ValidationLevel(before.level) not in NEED_REFERENCE:
        return before
    assert expected.spoken is not None, f"validation={before.level} needs a reference"
    with clock.span(LOGITS_SPAN):
        look = logits.look(loaded.model, expected.spoken)
    own_s = clock.phases[-1].duration_s
    findings = [*before.findings, *look.findings]
    claim = f"{before.reason}; {look.claim}" if before.ran else look.claim
    return replace(
        before,
        passed=not findings,
        ran=True,
        reason=replace(look, claim=claim, findings=findings).reason(),
        findings=findings,
        total_s=before.total_s + own_s,
        metrics={**before.metrics, **look.metrics, "validation/logits_s": own_s},
        claim=None if findings else _joined(before.claim, spoken_claim(expected)),
    )


def _joined(*claims: str | None) -> str | None:
    return "; ".join(claim for claim in claims if claim) or None
