"""The level `origin_rule`: the origin case's cure as a whole, skipped on one explicit device, `sampled` otherwise."""

from dataclasses import replace

from ladezeit.config import ValidationConfig
from ladezeit.loading.base import EngineModel
from ladezeit.validation import sampled
from ladezeit.validation.faults import Fault
from ladezeit.validation.proof import Expected, Look

#: Skipped on one explicit device; what a sample finds otherwise cannot be promised.
CLAIMS: frozenset[Fault] = frozenset()


def look(loaded: EngineModel, expected: Expected, config: ValidationConfig) -> Look:
    """Skip the validation where one explicit device was asked for; look at a sample of the modules otherwise."""
    if expected.single_device:
        return Look(f"skipped: {expected.device} was asked for explicitly, so nothing was looked at", ran=False)
    look = sampled.look(loaded, expected, config)
    return replace(look, claim=f"sampled, because the placement is not one explicit device: {look.claim}")
