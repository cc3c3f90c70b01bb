"""What is verified about a loaded model, and what that costs, level by level.

`placement` looks at every tensor for everything that can be seen without reading it; `content` reads every tensor too
and holds it against what the checkpoint says; `logits` listens to the model; `full` is all three. The other levels are
the origin case's: they look for meta tensors, more or less thoroughly, and find nothing else.
"""

from collections.abc import Callable
from dataclasses import replace

from ladezeit.config import ValidationConfig, ValidationLevel
from ladezeit.loading.base import EngineModel
from ladezeit.timing.clock import Clock
from ladezeit.validation import content, logits, placement
from ladezeit.validation.expected import Expected
from ladezeit.validation.faults import BEFORE_LOADING, Fault
from ladezeit.validation.model_checks import logits_claim
from ladezeit.validation.references import NEED_REFERENCE
from ladezeit.validation.verification import META, Finding, LevelReport, Verification

SPAN = "validation"
LOGITS_SPAN = "validation/logits"

#: An offloaded weight is on meta between forwards, so it is found too, whether it was asked for or not.
ALL_MODULES_CLAIMS = frozenset({Fault.buffer_on_meta, Fault.weight_on_meta, Fault.silent_offload})

#: Skipped on one explicit device; what a sample finds otherwise cannot be promised.
ORIGIN_RULE_CLAIMS: frozenset[Fault] = frozenset()

#: A sample finds what happens to lie in it: nothing that can be promised.
SAMPLED_CLAIMS: frozenset[Fault] = frozenset()

#: What each level finds whatever engine loaded, with what is refused before any load; held to it by the fault bench.
CLAIMS: dict[ValidationLevel, frozenset[Fault]] = {
    ValidationLevel.none: BEFORE_LOADING,
    ValidationLevel.sampled: BEFORE_LOADING | SAMPLED_CLAIMS,
    ValidationLevel.origin_rule: BEFORE_LOADING | ORIGIN_RULE_CLAIMS,
    ValidationLevel.all_modules: BEFORE_LOADING | ALL_MODULES_CLAIMS,
    ValidationLevel.placement: BEFORE_LOADING | placement.CLAIMS,
    ValidationLevel.content: BEFORE_LOADING | content.CLAIMS,
    ValidationLevel.logits: BEFORE_LOADING | logits.CLAIMS,
    ValidationLevel.full: BEFORE_LOADING | content.CLAIMS | logits.CLAIMS,
}


def _none(loaded: EngineModel, expected: Expected, config: ValidationConfig) -> LevelReport:
    return LevelReport("nothing was looked at (validation=none)", ran=False)


def _later(loaded: EngineModel, expected: Expected, config: ValidationConfig) -> LevelReport:
    return LevelReport("the model was not asked yet", ran=False)


# The level `all_modules`: meta tensors, looked for in every module and in all that is below it. The origin case's
# manager did this after every load: each tensor is looked at once for every module above it, so the cost grows with
# the depth of the tree, and with how slowly one look goes.


def check_all_modules(loaded: EngineModel, expected: Expected, config: ValidationConfig) -> LevelReport:
    """Walk every module with its recursive parameters and buffers; finds meta tensors and nothing else."""
    modules_seen = tensors_seen = 0
    found: dict[str, None] = {}
    for path, module in loaded.model.named_modules():
        modules_seen += 1
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            tensors_seen += 1
            if tensor.is_meta:
                found[f"{path}.{name}" if path else name] = None
    return LevelReport(
        summary=f"no parameter or buffer of {modules_seen} modules is on meta; nothing else was looked for",
        modules_seen=modules_seen,
        tensors_seen=tensors_seen,
        findings=[Finding("meta", name, META) for name in found],
    )


# The level `origin_rule`: the origin case's cure as a whole, skipped on one explicit device, `sampled` otherwise.


def check_by_origin_rule(loaded: EngineModel, expected: Expected, config: ValidationConfig) -> LevelReport:
    """Skip the validation where one explicit device was asked for; look at a sample of the modules otherwise."""
    if expected.single_device:
        return LevelReport(f"skipped: {expected.device} was asked for explicitly, so nothing was looked at", ran=False)
    look = check_sampled_modules(loaded, expected, config)
    return replace(look, summary=f"sampled, because the placement is not one explicit device: {look.summary}")


# The level `sampled`: meta tensors, looked for in the first and last modules only, as the origin case's cure did.


def check_sampled_modules(loaded: EngineModel, expected: Expected, config: ValidationConfig) -> LevelReport:
    """Look at the tensors that the first and last `config.k` modules hold themselves; what lies between is not seen."""
    modules = list(loaded.model.named_modules())
    sample = modules if len(modules) <= 2 * config.k else modules[: config.k] + modules[-config.k :]
    tensors_seen = 0
    findings = []
    for path, module in sample:
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            tensors_seen += 1
            if tensor.is_meta:
                findings.append(Finding("meta", f"{path}.{name}" if path else name, META))
    return LevelReport(
        summary=f"no tensor held by {len(sample)} of {len(modules)} modules is on meta; the others were not looked at",
        modules_seen=len(sample),
        tensors_seen=tensors_seen,
        findings=findings,
    )


_LEVELS: dict[ValidationLevel, Callable[[EngineModel, Expected, ValidationConfig], LevelReport]] = {
    ValidationLevel.none: _none,
    ValidationLevel.sampled: check_sampled_modules,
    ValidationLevel.all_modules: check_all_modules,
    ValidationLevel.origin_rule: check_by_origin_rule,
    ValidationLevel.placement: placement.check_placement,
    ValidationLevel.content: content.check_content,
    ValidationLevel.logits: _later,
    ValidationLevel.full: content.check_content,
}


def verify_model(loaded: EngineModel, expected: Expected, config: ValidationConfig, clock: Clock) -> Verification:
    """Look at `loaded` as far as `config.level` says, inside the span ``validation``; changes nothing in the model.

    What is wrong is in the verification's findings; nothing is raised for it. What the model says is verified by
    `verify_generation`.
    """
    with clock.span(SPAN):
        look = _LEVELS[config.level](loaded, expected, config)
    return Verification(
        level=config.level.value,
        passed=look.ran and not look.findings,
        ran=look.ran,
        reason=look.describe_reason(),
        modules_seen=look.modules_seen,
        tensors_seen=look.tensors_seen,
        findings=look.findings,
        total_s=clock.phases[-1].duration_s,
        metrics=look.metrics,
        claim=look.guarantee if look.ran and not look.findings else None,
    )


def verify_loaded(loaded: EngineModel, expected: Expected, config: ValidationConfig, clock: Clock) -> Verification:
    """Verify in one go what nobody measures in between: `verify_model`, and `verify_generation` where that passed."""
    found = verify_model(loaded, expected, config, clock)
    return verify_generation(loaded, expected, found, clock) if found.passed or not found.ran else found


def verify_generation(loaded: EngineModel, expected: Expected, before: Verification, clock: Clock) -> Verification:
    """Return `before` with what the model says verified too, inside a span of its own, where its level asks for that.

    Call it after the measured first tokens: they must meet the model as its load left it.
    """
    if ValidationLevel(before.level) not in NEED_REFERENCE:
        return before
    assert expected.reference is not None, f"validation={before.level} needs a reference"
    with clock.span(LOGITS_SPAN):
        look = logits.check_logits(loaded.model, expected.reference)
    own_s = clock.phases[-1].duration_s
    findings = [*before.findings, *look.findings]
    claim = f"{before.reason}; {look.summary}" if before.ran else look.summary
    return replace(
        before,
        passed=not findings,
        ran=True,
        reason=replace(look, summary=claim, findings=findings).describe_reason(),
        findings=findings,
        total_s=before.total_s + own_s,
        metrics={**before.metrics, **look.metrics, "validation/logits_s": own_s},
        claim=None if findings else _joined(before.claim, logits_claim(expected)),
    )


def _joined(*claims: str | None) -> str | None:
    return "; ".join(claim for claim in claims if claim) or None
