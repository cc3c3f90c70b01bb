"""A report as Markdown: the verdict's words first, the evidence below them, what is needed to check it last."""

from collections.abc import Sequence
from pathlib import Path

from ladezeit.results.comparison_table import plain, section_markdown
from ladezeit.results.report import facts
from ladezeit.results.report.document import Report
from ladezeit.results.report.origin_case import beside_the_origin
from ladezeit.results.report.pictures import MOST_SECTIONS, Drawn
from ladezeit.results.report.plots.canvas import Picture
from ladezeit.results.verdict_words import answer, section


def as_markdown(report: Report, pictures: Sequence[Drawn], folder: Path, raw: str | None = None) -> str:
    """Return the report for a file in `folder`.

    Args:
        report: what to write.
        pictures: those of each section; files of their names lie in `folder`.
        folder: what links are relative to.
        raw: the name of a file in `folder` that holds all results; None links each sample's own file.
    """
    parts = [f"# {plain(report.title)}", report.head]
    if len(report.decisions) > 1:
        parts.append("\n".join(f"- **{decision.title}**: {answer(decision)}" for decision in report.decisions))
    parts += [f"Note: {note}." for note in report.notes]
    for index, drawn in enumerate(pictures):
        parts += _section(report, index, drawn)
    parts += ["## What was left out", _lines(facts.left_out(report.samples))]
    parts += ["## Environment", _table(facts.environment(report.samples.results))]
    parts += ["## Measure it again", "\n".join(f"- {plain(w)}:  \n  {code(c)}" for w, c in facts.commands(report))]
    parts += ["## Raw files", _raw(report, folder, raw)]
    return "\n\n".join(parts) + "\n"


def _section(report: Report, index: int, drawn: Drawn) -> list[str]:
    decision, compared = report.decisions[index], report.load.sections[index]
    said, *more = section(decision, report.decisions)
    parts = [f"## {decision.title}", said, *map(_image, drawn.leading), *more]
    parts += ["### All methods", *section_markdown(report.load, compared, apart=False)]
    parts += beside_the_origin(compared)
    if drawn.others:
        parts += ["### Pictures", *map(_image, drawn.others)]
    elif index >= MOST_SECTIONS:
        parts.append(f"Without pictures: only the first {MOST_SECTIONS} sections have them.")
    costs = report.validation_costs.sections[index]
    if not report.catches and len({point.level for point in [*costs.ranked, *costs.apart] if point.spread}) > 1:
        parts.append("How many faults each level finds is not known to this ladezeit: the cost is shown alone.")
    return parts


def _image(picture: Picture) -> str:
    alt = picture.alt.replace("[", "(").replace("]", ")")
    return f"![{alt}]({picture.name}.png)\n*{picture.caption.strip().replace('*', '')}*"


def _raw(report: Report, folder: Path, raw: str | None) -> str:
    if raw is not None:
        return f"[{raw}]({raw}): one result a line, as in `result.json`; `ladezeit-results` reads it."
    lines = _lines([f"{plain(what)}: {' '.join(links)}" for what, links in facts.raw_files(report, folder)])
    return f"The links lead from the folder that this report was written into.\n\n{lines}"


def _table(facts_by_name: dict[str, str]) -> str:
    rows = [f"| {plain(name)} | {plain(text)} |" for name, text in facts_by_name.items()]
    return "\n".join(["| fact | value |", "| :-- | :-- |", *rows])


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def code(text: str) -> str:
    """Return `text` as a span of code, whatever ticks are in it."""
    one_line = " ".join(text.split())
    ticks = "`"
    while ticks in one_line:
        ticks += "`"
    pad = " " if one_line[:1] == "`" or one_line[-1:] == "`" else ""
    return f"{ticks}{pad}{one_line}{pad}{ticks}"
