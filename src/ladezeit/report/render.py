"""A report as files: Markdown, HTML and pictures side by side, and the form in which results are kept for good."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ladezeit.errors import LadezeitError
from ladezeit.redaction import redact_text
from ladezeit.report import case_study, document, figures, timeline
from ladezeit.report.canvas import Picture
from ladezeit.report.comparison_table import escape_cell, section_markdown
from ladezeit.report.document import Report
from ladezeit.report.verdict import describe_answer, describe_section
from ladezeit.results.records import Result
from ladezeit.system.files import write_atomically

_NAME = re.compile(r"[\w.+-]+")

#: The folders in front of a file's name, but for devices and addresses: they say where, on a machine that nobody knows.
_FOLDERS = re.compile(r"(?<![\w:/.…])/(?!dev/)(?:[^\s\"'\\/:|`)]+/)+(?=[^\s\"'\\/:|`)])")

_STYLE = "report.css"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""

#: Sections beyond these have tables only.
MOST_SECTIONS = 12


def write_report(report: Report, folder: Path, name: str) -> list[Path]:
    """Write ``name.md``, ``name.html`` and the pictures into `folder`, over those of an earlier report.

    Returns the paths, Markdown and HTML first.

    Raises:
        LadezeitError: `name` is no name of a file.
    """
    _check(name)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_pictures(report, name)
    pictures = [picture for own in drawn for picture in own.all]
    text = redact_text(as_markdown(report, drawn, folder))
    paths = [folder / f"{name}.md", folder / f"{name}.html"]
    write_atomically(paths[0], text)
    write_atomically(paths[1], as_html(text, pictures, report.heading))
    return [*paths, *_write_pictures(pictures, folder)]


def archive_report(report: Report, folder: Path, name: str) -> list[Path]:
    """Write ``name.md``, its pictures and ``name.jsonl`` (all results, one a line) into `folder`, to be kept.

    What the files say about the machine's own folders is cut out of them.

    Raises:
        LadezeitError: `name` is no name of a file, or something is kept under it already.
    """
    _check(name)
    kept, raw = folder / f"{name}.md", f"{name}.jsonl"
    for path in (kept, folder / raw):
        if path.exists():
            raise LadezeitError(f"{path} is kept already: choose another --name, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_pictures(report, name)
    lines = [_raw_line(result) for result in report.samples.results]
    write_atomically(folder / raw, "".join(f"{line}\n" for line in lines))
    write_atomically(kept, without_folders(redact_text(as_markdown(report, drawn, folder, raw))))
    return [kept, folder / raw, *_write_pictures([picture for own in drawn for picture in own.all], folder)]


def without_folders(text: str) -> str:
    """Return `text` with absolute paths cut to the names of their files.

    >>> without_folders("read /home/me/sweep/0/result.json from /dev/vda")
    'read …/result.json from /dev/vda'
    """
    return _FOLDERS.sub("…/", text)


def _check(name: str) -> None:
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise LadezeitError(f"--name '{name}': use letters, digits, '.', '_', '+' and '-'")


def _write_pictures(pictures: list[Picture], folder: Path) -> list[Path]:
    paths = []
    for picture in pictures:
        paths.append(folder / f"{picture.name}.png")
        paths[-1].write_bytes(picture.png)
    return paths


def _raw_line(result: Result) -> str:
    plain = result.to_dict()
    plain["config"] = {key: value for key, value in plain["config"].items() if key not in ("outputs", "tracking")}
    plain["environment"] = {key: value for key, value in plain["environment"].items() if key != "variables"}
    return json.dumps(_published(plain), ensure_ascii=False, allow_nan=False)


def _published(value: Any) -> Any:
    """Return plain data whose texts are without credentials and folders."""
    if isinstance(value, Mapping):
        return {key: _published(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_published(own) for own in value]
    return without_folders(redact_text(value)) if isinstance(value, str) else value


# A report as one HTML file that needs nothing else: style and pictures are in it, no address leads out of it.


def as_html(markdown: str, pictures: Sequence[Picture], title: str) -> str:
    """Return `markdown` as an HTML page with `pictures` inside, found by the names of their files.

    HTML in the Markdown is shown, not obeyed: reasons and names come from whatever was loaded.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    drawn = {f"{picture.name}.png": picture for picture in pictures}
    for token in tokens:
        if token.children:
            token.children = [_inner(child, drawn) for child in token.children]
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    style = (files(__package__) / _STYLE).read_text(encoding="utf-8")
    return _PAGE.format(title=escape(title), style=style, body=body)


def _inner(token: Any, drawn: dict[str, Picture]) -> Any:
    """Put pictures in the place of their addresses, and take the address from whatever would lead outside."""
    if token.type == "image":
        found = drawn.get(str(token.attrs.get("src")))
        return _html(_svg(found) if found else escape(token.content))
    if token.type == "link_open":
        address = urlsplit(str(token.attrs.get("href", "")))
        if address.scheme or address.netloc:
            token.attrs = {}
    return token


def _html(text: str) -> Any:
    from markdown_it.token import Token

    return Token("html_inline", "", 0, content=text)


def _svg(picture: Picture) -> str:
    """Return the picture as an inline drawing that says to a screen reader what is to be seen."""
    text = picture.svg.decode()
    drawing = text[text.index("<svg") :]
    # Several drawings share one page: what one defines must not be taken for another's.
    drawing = drawing.replace('id="', f'id="{picture.name}.').replace('href="#', f'href="#{picture.name}.')
    drawing = drawing.replace("url(#", f"url(#{picture.name}.")
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(picture.alt)}" ', 1)


# All pictures of a report, section by section.


@dataclass(frozen=True)
class Drawn:
    """The pictures of a section: `leading` stand below its answer, `others` below its table."""

    leading: list[Picture]
    others: list[Picture]

    @property
    def all(self) -> list[Picture]:
        """All of them."""
        return [*self.leading, *self.others]


# A report as Markdown: the verdict's words first, the evidence below them, what is needed to check it last.


def as_markdown(report: Report, pictures: Sequence[Drawn], folder: Path, raw: str | None = None) -> str:
    """Return the report for a file in `folder`.

    Args:
        report: what to write.
        pictures: those of each section; files of their names lie in `folder`.
        folder: what links are relative to.
        raw: the name of a file in `folder` that holds all results; None links each sample's own file.
    """
    parts = [f"# {escape_cell(report.heading)}", report.head]
    if len(report.decisions) > 1:
        parts.append("\n".join(f"- **{decision.title}**: {describe_answer(decision)}" for decision in report.decisions))
    parts += [f"Note: {note}." for note in report.notes]
    for index, drawn in enumerate(pictures):
        parts += _section(report, index, drawn)
    parts += ["## What was left out", _lines(document.left_out(report.samples))]
    parts += ["## Environment", _table(document.describe_environment(report.samples.results))]
    parts += [
        "## Measure it again",
        "\n".join(f"- {escape_cell(w)}:  \n  {code_span(c)}" for w, c in document.list_commands(report)),
    ]
    parts += ["## Raw files", _raw(report, folder, raw)]
    return "\n\n".join(parts) + "\n"


def _section(report: Report, index: int, drawn: Drawn) -> list[str]:
    decision, compared = report.decisions[index], report.load.sections[index]
    said, *more = describe_section(decision, report.decisions)
    parts = [f"## {decision.title}", said, *map(_image, drawn.leading), *more]
    parts += ["### All methods", *section_markdown(report.load, compared, apart=False)]
    if any(record.title == case_study.TITLE for record in report.samples.sweeps):
        parts += case_study.compare_with_reference_case(compared)
    if drawn.others:
        parts += ["### Pictures", *map(_image, drawn.others)]
    elif index >= MOST_SECTIONS:
        parts.append(f"Without pictures: only the first {MOST_SECTIONS} sections have them.")
    costs = report.validation_costs.sections[index]
    if not report.catches and len({point.level for point in [*costs.ranked, *costs.unranked] if point.spread}) > 1:
        parts.append("This installation has no data on how many faults each level finds: only the cost is shown.")
    return parts


def _image(picture: Picture) -> str:
    alt = picture.alt.replace("[", "(").replace("]", ")")
    return f"![{alt}]({picture.name}.png)\n*{picture.caption.strip().replace('*', '')}*"


def _raw(report: Report, folder: Path, raw: str | None) -> str:
    if raw is not None:
        return f"[{raw}]({raw}): one result per line, as in `result.json`; `ladezeit-results` reads it."
    lines = _lines([f"{escape_cell(what)}: {' '.join(links)}" for what, links in document.raw_files(report, folder)])
    return f"Links are relative to the folder that this report was written to.\n\n{lines}"


def _table(facts_by_name: dict[str, str]) -> str:
    rows = [f"| {escape_cell(name)} | {escape_cell(text)} |" for name, text in facts_by_name.items()]
    return "\n".join(["| fact | value |", "| :-- | :-- |", *rows])


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def code_span(text: str) -> str:
    """Return `text` as a span of code, whatever ticks are in it."""
    one_line = " ".join(text.split())
    ticks = "`"
    while ticks in one_line:
        ticks += "`"
    pad = " " if one_line[:1] == "`" or one_line[-1:] == "`" else ""
    return f"{ticks}{pad}{one_line}{pad}{ticks}"


def draw_pictures(report: Report, name: str) -> list[Drawn]:
    """Return the pictures of each section; their names begin with `name`."""
    points = [point for section in report.load.sections for point in section.ranked]
    color_of = figures.phase_palette(points)
    return [
        _of_section(report, index, color_of, f"{name}-{index + 1}") if index < MOST_SECTIONS else Drawn([], [])
        for index in range(len(report.decisions))
    ]


def _of_section(report: Report, index: int, color_of: dict[str, str], name: str) -> Drawn:
    load = report.load.sections[index]
    memory = report.get_section("gpu_memory", index), report.get_section("host_memory", index)
    leading = [
        figures.draw_samples(report.load, load, f"{name}-samples"),
        figures.draw_validation_cost(report.validation_costs.sections[index], report.catches, f"{name}-validation"),
    ]
    others = [
        figures.draw_phases(load, color_of, f"{name}-phases"),
        figures.draw_limits(load, *memory, f"{name}-limits"),
        *_timelines(report, index, name),
    ]
    return Drawn([own for own in leading if own], [own for own in others if own])


def _timelines(report: Report, index: int, name: str) -> Iterator[Picture | None]:
    """Yield the timelines of the best point and of the one with the longest load."""
    best = report.decisions[index].load.leader
    ranked = [point for point in report.load.sections[index].ranked if point.spread]
    slowest = max(ranked, key=lambda point: point.spread.median if point.spread else 0.0, default=None)
    if best is not None:
        yield timeline.draw_point(best, "The best median", f"{name}-timeline-best")
    if slowest is not None and slowest.point != (best.point if best else None):
        yield timeline.draw_point(slowest, "The slowest", f"{name}-timeline-slowest")
