"""What a sweep says at its end, in the terminal and in MLflow: the verdict in short, then the table."""

from collections.abc import Sequence

from ladezeit.errors import LadezeitError
from ladezeit.result import Result
from ladezeit.results.table import as_markdown

_MOST_LINES = 24


def closing_words(results: Sequence[Result], varying: Sequence[str]) -> list[str]:
    """Return the verdict in a few lines of Markdown: what is best in each section, and where the others' time goes."""
    from ladezeit.results.decision import decide
    from ladezeit.results.found_varying import found_varying
    from ladezeit.results.verdict_words import in_short

    declared = [key for key in varying if key != "sample"]
    try:
        decisions, _ = decide(results, found_varying(results, declared))
    except LadezeitError as error:
        return [f"There is no verdict: {error}."]
    lines = in_short(decisions)
    more = len(lines) - _MOST_LINES
    return lines[:_MOST_LINES] + ([f"… and {more} more lines in the report"] if more > 0 else [])


def summary(results: Sequence[Result], varying: Sequence[str]) -> str:
    """Return the closing words and the table of all points as Markdown."""
    words = "\n".join(f"- {line}" for line in closing_words(results, varying))
    return f"{words}\n\n{as_markdown(results, varying)}"
