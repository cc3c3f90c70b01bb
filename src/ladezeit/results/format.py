"""How durations are written, in tables, sentences and pictures alike."""

NOTHING = "–"


def format_seconds(value: float | None) -> str:
    """Return a duration in seconds with four digits, three after the point at most; a dash for None."""
    if value is None:
        return NOTHING
    if 0 < value < 0.0005:
        return "<0.001"
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 10 else 3
    return f"{value:.{digits}f}"
