"""What is proven about a loaded model, and what the proof costs: one module a level.

Only `placement` looks at every tensor for everything that can be seen without reading the checkpoint again. The other
levels are the origin case's: they look for meta tensors, more or less thoroughly, and find nothing else.
"""

from collections.abc import Callable

from ladezeit.config import ValidationConfig, ValidationLevel
from ladezeit.loading.base import LoadedModel
from ladezeit.measure.clock import Clock
from ladezeit.validation import all_modules, origin_rule, placement, sampled
from ladezeit.validation.generation import stored_generation_config
from ladezeit.validation.proof import Expected, Finding, Look, Proof

__all__ = ["SPAN", "Expected", "Finding", "Proof", "prove", "stored_generation_config"]

SPAN = "validation"


def _none(loaded: LoadedModel, expected: Expected, config: ValidationConfig) -> Look:
    return Look("nothing was looked at (validation=none)", ran=False)


_LEVELS: dict[ValidationLevel, Callable[[LoadedModel, Expected, ValidationConfig], Look]] = {
    ValidationLevel.none: _none,
    ValidationLevel.sampled: sampled.look,
    ValidationLevel.all_modules: all_modules.look,
    ValidationLevel.origin_rule: origin_rule.look,
    ValidationLevel.placement: placement.look,
}


def prove(loaded: LoadedModel, expected: Expected, config: ValidationConfig, clock: Clock) -> Proof:
    """Look at `loaded` as far as `config.level` says, inside the span ``validation``; changes nothing in the model.

    What is wrong is in the proof's findings; nothing is raised for it.
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
    )
