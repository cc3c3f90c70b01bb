"""Errors that say what was asked, what was found and what to do.

Every error a user can cause is a `LadezeitError`. Whoever catches one prints its text alone; a stack trace is for
defects, which are everything else.
"""

import errno
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from ladezeit.redaction import redact_text

#: Exit code of console scripts: nothing was done, and the user can cure it.
USAGE = 2
#: Exit code of processes that ladezeit starts besides workers: memory ran out there.
MEMORY_FULL = errno.ENOMEM

#: What libraries say whose errors have no type for it: torch's host allocator ("can't allocate memory"), its CUDA calls
#: and other engines' (cudaGetErrorString's "out of memory"), cuBLAS and cuDNN (…_ALLOC_FAILED), C++ (std::bad_alloc),
#: the C library (ENOMEM), instanttensor.
_OUT_OF_MEMORY = re.compile(
    r"\bout of memory\b|\bcan(?:'t|not) allocate memory\b(?! in static TLS)|_ALLOC_FAILED\b|std::bad_alloc"
    r"|\bdevice memory budget\b",
    re.IGNORECASE,
)


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


class OutOfMemoryError(LoadError):
    """Memory of a device or of the host ran out while a model was loaded or checked."""


#: Why a configuration cannot be measured here, found out before a sample: a sweep records it and goes on.
REFUSALS = (CheckpointError, CombinationError, NotRunnableError, OutOfMemoryError)


class WorkerError(LadezeitError):
    """The measured process could not be started or did not answer."""


class TrackingError(LadezeitError):
    """The tracking store could not be reached or written; results on disk are not touched by it."""


def shorten_value(value: object, most: int = 120) -> str:
    """Return `value` as printable text of bounded length, for error messages about content that may be hostile."""
    text = str(value)
    text = text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"
    return text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text


def ran_out_of_memory(error: BaseException) -> bool:
    """Say whether an error, or one that it came from, is that memory of a device or of the host ran out.

    Causes are followed as a stack trace shows them: what was raised ``from None`` came from nothing.
    """
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        if _is_out_of_memory(one):
            return True
        seen.add(id(one))
        one = one.__cause__ if one.__cause__ is not None or one.__suppress_context__ else one.__context__
    return False


def says_out_of_memory(text: str) -> bool:
    """Say whether a library's words are that memory of a device or of the host ran out."""
    return _OUT_OF_MEMORY.search(text) is not None


@contextmanager
def exit_where_memory_ends() -> Iterator[None]:
    """Leave the process with exit code `MEMORY_FULL` where the block runs out of memory."""
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        traceback.print_exc()
        sys.exit(MEMORY_FULL)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, LadezeitError):  # its words may be about memory for any reason
        return isinstance(error, OutOfMemoryError)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, Exception) and says_out_of_memory(str(error))


def run_as(script: str, command: Callable[[], object]) -> None:
    """Run a console script; an error that its user can cure is one line and exit code `USAGE`."""
    try:
        command()
    except LadezeitError as error:
        print(redact_text(f"{script}: {error}"), file=sys.stderr)
        sys.exit(USAGE)


def did_you_mean(requested: str, valid: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the valid names nearest to `requested`, or an empty string where none is
    near.
    """
    near = get_close_matches(requested, list(valid), n=2, cutoff=0.5)
    if not near:
        return ""
    return " Did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
