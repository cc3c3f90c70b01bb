"""Phases that a user's own code marks: ``with ladezeit.phase("validation"):``, free where nothing measures.

Nothing heavy is imported: the mark may stand in a service that never measures anything.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from ladezeit.errors import ConfigError

if TYPE_CHECKING:
    from ladezeit.measure.clock import Clock

_clock: "Clock | None" = None
_NOTHING: AbstractContextManager[None] = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """Time the block as the phase ``load/<name>`` while a load is traced; do nothing otherwise.

    Raises:
        ConfigError: while a load is traced: `name` is empty, or starts or ends with a slash.
    """
    if _clock is None:
        return _NOTHING
    if not name or name != name.strip("/"):
        raise ConfigError(f"ladezeit.phase({name!r}): give the phase a name, without a slash at its ends")
    return _clock.span(f"load/{name}")


@contextmanager
def marks_on(clock: "Clock") -> Iterator[None]:
    """Let marks count on `clock` for the time of the block."""
    global _clock
    before, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = before
