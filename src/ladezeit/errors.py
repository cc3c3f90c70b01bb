"""Errors that say what was asked, what was found and what to do.

Every error a user can cause is a `LadezeitError`. Whoever catches one prints its text alone; a stack trace is for
defects, which are everything else.
"""

import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ladezeit.validation import Finding, Proof


#: Exit code of console scripts: nothing was done, and the user can cure it.
USAGE = 2


class LadezeitError(Exception):
    """Base of all errors a user can cause and cure; its text is complete without a stack trace."""


class ConfigError(LadezeitError):
    """The configuration asks for something that has no meaning: a wrong value, key or combination."""


class CombinationError(ConfigError):
    """Values that are right by themselves do not go together: alone an error, in a sweep a skipped point."""


class CheckpointError(LadezeitError):
    """The checkpoint is missing, incomplete, damaged, or not safe to read."""


class NotRunnableError(LadezeitError):
    """This machine cannot run what the configuration asks for (no such device, too little memory or disk)."""


class LoadError(LadezeitError):
    """A load ended without the model that was asked for: missing weights, unasked offload, changed dtype."""


class ValidationError(LoadError):
    """A model was loaded and failed its proof; `findings` are all that was found, `proof` the whole of it."""

    def __init__(self, message: str, proof: "Proof") -> None:
        super().__init__(message)
        self.proof = proof

    @property
    def findings(self) -> "list[Finding]":
        """What is not as asked, one entry a tensor or module."""
        return self.proof.findings


class WorkerError(LadezeitError):
    """The measured process could not be started or did not answer."""


class TrackingError(LadezeitError):
    """The tracking store could not be reached or written; results on disk are not touched by it."""


def run_as(script: str, command: Callable[[], object]) -> None:
    """Run a console script; an error that its user can cure is one line and exit code `USAGE`."""
    try:
        command()
    except LadezeitError as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(USAGE)


def did_you_mean(asked: str, valid: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the valid names nearest to `asked`, or an empty string where none is near."""
    near = get_close_matches(asked, list(valid), n=2, cutoff=0.5)
    if not near:
        return ""
    return " Did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
