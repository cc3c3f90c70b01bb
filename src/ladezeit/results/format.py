"""How durations and probabilities are written, in tables, sentences and pictures alike."""

NOTHING = "–"
#: Columns of a table that goes into a file or a pipe, where nobody said how wide it may be.
LOG_WIDTH = 140


def format_seconds(value: float | None) -> str:
    """Return a duration in seconds with four digits, three after the point at most; a dash for None."""
    if value is None:
        return NOTHING
    if 0 < value < 0.0005:
        return "<0.001"
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 10 else 3
    return f"{value:.{digits}f}"


def format_p(p: float | None, sign: str = "=") -> str:
    """Return ``p = 0.040``, ``p < 0.001`` whatever the `sign`, or ``p = –`` for None."""
    if p is None:
        return f"p {sign} {NOTHING}"
    return "p < 0.001" if p < 0.001 else f"p {sign} {p:.3f}"
