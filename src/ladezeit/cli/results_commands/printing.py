"""The terminal as the commands see it."""

from rich.console import Console

#: Columns of a table that goes into a file or a pipe, where nobody said how wide it may be.
_LOG_WIDTH = 140


def make_console() -> Console:
    """Return a console for stdout; $COLUMNS sets the width of what goes into a pipe."""
    import os

    own = Console(highlight=False)
    if not own.is_terminal and not os.environ.get("COLUMNS"):
        own.width = _LOG_WIDTH
    return own
