"""A comparison as text for people: a table that fits its terminal, and Markdown."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ladezeit.analysis.comparison import Comparison, PointFigures, Section
from ladezeit.analysis.eligibility import format_value, unit_of
from ladezeit.analysis.statistics import LEAST_TO_RANK, Spread, samples_needed
from ladezeit.results.format import NOTHING

#: Columns that a narrow terminal goes without, the first to go first; all are in CSV, JSON and Markdown.
_OPTIONAL = ("MAD", "min", "verified", "of ceiling")
_MOST_REASON = 200
_ODDITIES = 6


@dataclass(frozen=True)
class Column:
    """A column of figures: its head, how a point fills it, and the least width of its cells in characters."""

    head: str
    cell: Callable[[PointFigures], str]
    left: bool = False
    least_width: int | None = None


def select_columns(comparison: Comparison, section: Section) -> list[Column]:
    """Return the columns of a section's table, rank first, in the order in which they are read."""
    metric = comparison.metric
    unit = unit_of(metric)
    base = section.baseline
    found = [Column("#", lambda point: str(point.rank or NOTHING))]
    keys = [key for key in comparison.keys if len({point.values[key] for point in section.ranked}) > 1]
    keys = keys or comparison.keys[:1]
    found += [Column(key, _value_of(key), left=True) for key in keys]
    found += [
        Column("n", lambda point: str(point.spread.n if point.spread else 0)),
        Column(f"median {unit}".strip(), lambda point: _of(point, metric, "median")),
        Column("MAD", lambda point: _of(point, metric, "mad")),
        Column("min", lambda point: _of(point, metric, "least")),
        Column("interval", lambda point: interval_text(point, metric)),
        Column("× baseline", lambda point: "1 (baseline)" if base is point else _ratio(point)),
        Column("p", lambda point: p_text(point.p)),
        Column("of ceiling", lambda point: format_percent(point.ceiling_share)),
        Column("verified", lambda point: point.level, left=True),
        Column("samples", counts_text, left=True),
    ]
    needless = {"of ceiling"} if all(point.ceiling_share is None for point in section.ranked) else set()
    needless |= {"verified"} if "validation" in keys else set()
    return [column for column in found if column.head not in needless]


def _value_of(key: str) -> Callable[[PointFigures], str]:
    return lambda point: point.values[key] or NOTHING


def as_rich(comparison: Comparison, width: int, sort: str = "rank") -> RenderableType:
    """Return all sections for a terminal of `width` columns."""
    parts: list[RenderableType] = []
    for section in comparison.sections:
        if section.ranked:
            parts += _rich_section(comparison, section, width, sort)
        else:
            parts.append(Text(f"{section.title}: no verified sample, nothing to rank", style="bold"))
        if section.unranked:
            parts.append(Text("not ranked" + ("" if section.ranked else ":"), style="yellow"))
            parts += [
                Text.assemble("  ", (point.name, "bold"), f": {apart_text_of(point, comparison.metric)}")
                for point in section.unranked
            ]
        parts.append(Text(""))
    parts += [Text(f"note: {note}", style="yellow") for note in comparison.notes]
    return Group(*parts)


def _rich_section(comparison: Comparison, section: Section, width: int, sort: str) -> list[RenderableType]:
    shown = select_columns(comparison, section)
    rows = sort_points(section.ranked, sort)
    hidden = []
    for head in _OPTIONAL:
        if _width(shown, rows) <= width:
            break
        if any(column.head == head for column in shown):
            shown = [column for column in shown if column.head != head]
            hidden.append(head)
    table = draw_table(section.title, shown, [rows])
    legend = legend_of(comparison, section)
    if hidden:
        legend += f" Not shown at this width: {', '.join(hidden)}."
    return [
        table,
        Text(legend, style="dim"),
        *(Text(f"  {line}", style="yellow") for line in describe_oddities(section, comparison.metric)),
    ]


def draw_table(title: str, shown: Sequence[Column], sections: Sequence[Sequence[PointFigures]]) -> Table:
    """Return the points of all `sections` as one table for a terminal, a rule between them; the best are bold."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=escape(title), title_justify="left")
    for column in shown:
        # A figure that is broken over two lines is a wrong figure: names give way where the terminal is narrow.
        table.add_column(
            escape(_stacked(column)),
            justify="left" if column.left else "right",
            no_wrap=not column.left,
            min_width=column.least_width,
            overflow="fold",
            vertical="top",
        )
    for points in sections:
        for point in points:
            style = "bold" if point.rank == 1 else None
            table.add_row(*(escape(column.cell(point)) for column in shown), style=style)
        table.add_section()
    return table


def markdown_table(shown: Sequence[Column], points: Sequence[PointFigures]) -> str:
    """Return the points as a table in Markdown."""
    lines = [[column.head for column in shown], [":--" if column.left else "--:" for column in shown]]
    lines += [[column.cell(point) for column in shown] for point in points]
    return "\n".join("| " + " | ".join(escape_cell(cell) for cell in line) + " |" for line in lines)


def _width(shown: Sequence[Column], rows: Sequence[PointFigures]) -> int:
    heads = (max(map(len, _stacked(column).split("\n"))) for column in shown)
    cells = (max(len(column.cell(point)) for point in rows) for column in shown)
    return sum(2 + max(pair) for pair in zip(heads, cells, strict=True))


def _stacked(column: Column) -> str:
    """Return a column's head, its words below each other where figures stand under it."""
    return column.head if column.left else "\n".join(column.head.split())


def sort_points(points: Sequence[PointFigures], sort: str) -> list[PointFigures]:
    """Return `points` by ``rank`` (as they are), ``median``, ``min``, ``mad``, ``n`` or a varying key."""
    if sort == "rank":
        return list(points)
    numbers: dict[str, Callable[[PointFigures], float]] = {
        "median": lambda point: point.spread.median if point.spread else 0.0,
        "min": lambda point: point.spread.least if point.spread else 0.0,
        "mad": lambda point: point.spread.mad if point.spread else 0.0,
        "n": lambda point: point.spread.n if point.spread else 0,
    }
    if sort in numbers:
        return sorted(points, key=numbers[sort])
    return sorted(points, key=lambda point: point.values.get(sort, ""))


def legend_of(comparison: Comparison, section: Section) -> str:
    """Return what a reader has to know about the figures of a section, in a few sentences."""
    sizes = sorted({point.spread.n for point in section.ranked if point.spread})
    text = "Equal # = not distinguishable from the best of that rank (exact Mann-Whitney test, Holm-adjusted). "
    if sizes[0] < LEAST_TO_RANK:
        text = f"Configurations with fewer than {LEAST_TO_RANK} samples have no #: too few to tell them apart. " + (
            "" if sizes[-1] < LEAST_TO_RANK else text
        )
    needed = samples_needed(len(section.ranked))
    if LEAST_TO_RANK <= sizes[0] < needed:
        text += f"{len(section.ranked)} configurations cannot be told apart with fewer than {needed} samples each. "
    text += coverage_of([point.spread for point in section.ranked if point.spread])
    if sizes[-1] == 1:
        return text
    ratios = [point.ratio.interval.coverage for point in section.ranked if point.ratio]
    if ratios:
        text += f" For the ratio it is {'at least ' if len(set(ratios)) > 1 else ''}{100 * min(ratios):.1f} %."
    if section.baseline:
        text += f" p: against the baseline, {section.baseline.name}."
    return text


def coverage_of(spreads: Sequence[Spread]) -> str:
    """Return in a sentence how much the intervals of `spreads` (at least one) promise."""
    sizes = sorted({spread.n for spread in spreads})
    if sizes[-1] == 1:
        return "One sample per configuration says nothing about the spread."
    covers = f"{100 * min(spread.interval.coverage for spread in spreads):.1f} %"
    within = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    least = "at least " if len(sizes) > 1 else ""
    return f"The interval covers the true median with a probability of {least}{covers} (n = {within})."


def describe_oddities(section: Section, metric: str) -> list[str]:
    """Return lines about outliers and samples that ended badly, of ranked points."""
    lines = []
    for point in section.ranked:
        if point.spread and point.spread.outliers:
            values = ", ".join(format_value(value, metric) for value in point.spread.outliers)
            lines.append(f"{point.name}: far from its median, but counted: {values} {unit_of(metric)}")
        lines += [f"{point.name}: {truncate_text(problem)}" for problem in point.problems]
    more = len(lines) - _ODDITIES
    return lines[:_ODDITIES] + ([f"… and {more} more such lines (--format json has all)"] if more > 0 else [])


def apart_text_of(point: PointFigures, metric: str) -> str:
    """Return why a point is not ranked and what it measured all the same."""
    measured = ""
    if point.spread:
        measured = f" (median {format_value(point.spread.median, metric)} {unit_of(metric)}, n = {point.spread.n})"
    return f"{truncate_text(point.excluded or '')}{measured}"


def as_markdown(comparison: Comparison, sort: str = "rank") -> str:
    """Return all sections as Markdown tables, with every column."""
    parts = []
    for section in comparison.sections:
        parts += [f"**{escape_cell(section.title)}**", *section_markdown(comparison, section, sort)]
    parts += [f"Note: {note}" for note in comparison.notes]
    return "\n\n".join(parts) + "\n"


def section_markdown(comparison: Comparison, section: Section, sort: str = "rank", *, apart: bool = True) -> list[str]:
    """Return a section as paragraphs of Markdown: its table, how to read it, what is odd, and what stands `apart`."""
    parts = []
    if section.ranked:
        parts.append(markdown_table(select_columns(comparison, section), sort_points(section.ranked, sort)))
        parts.append(legend_of(comparison, section))
    odd = describe_oddities(section, comparison.metric)
    if apart:
        odd += [f"not ranked: {point.name}: {apart_text_of(point, comparison.metric)}" for point in section.unranked]
    if odd:
        parts.append("\n".join(f"- {escape_cell(line)}" for line in odd))
    return parts


def p_text(p: float | None) -> str:
    """Return a p as it is written in tables."""
    if p is None:
        return NOTHING
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def p_said(p: float | None, sign: str = "=") -> str:
    """Return ``p = 0.040``, or ``p < 0.001`` whatever the `sign`."""
    return "p < 0.001" if p is not None and p < 0.001 else f"p {sign} {p_text(p)}"


def format_percent(share: float | None) -> str:
    """Return a share as percent with two digits; a dash for None."""
    if share is None:
        return NOTHING
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def counts_text(point: PointFigures) -> str:
    """Return how the samples of a point ended: ``5 ok, 1 oom``."""
    return ", ".join(f"{count} {status}" for status, count in point.counts.items())


def truncate_text(text: str, most: int = _MOST_REASON) -> str:
    """Return `text`, visibly shortened where it is longer than `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _of(point: PointFigures, metric: str, name: str) -> str:
    return format_value(getattr(point.spread, name), metric) if point.spread else NOTHING


def interval_text(point: PointFigures, metric: str) -> str:
    """Return the interval of a point's median; a dash where its values promise nothing."""
    if point.spread is None or point.spread.interval.coverage == 0:
        return NOTHING
    within = point.spread.interval
    return f"{format_value(within.low, metric)}–{format_value(within.high, metric)}"


def _ratio(point: PointFigures) -> str:
    if point.ratio is None:
        return NOTHING
    within = point.ratio.interval
    inside = f" ({within.low:.3g}–{within.high:.3g})" if within.coverage > 0 else ""
    return f"{point.ratio.estimate:.3g}{inside}"


def escape_cell(cell: str) -> str:
    """Return a text that breaks no row of a Markdown table."""
    return cell.replace("|", "\\|").replace("\n", " ")


# A comparison as data for programs: flat records, CSV, JSON.


def flatten_records(comparison: Comparison, sort: str = "rank") -> list[dict[str, Any]]:
    """Return one flat record a point, unrounded, the ranked ones of each section first."""
    return [
        _record(comparison, section, point)
        for section in comparison.sections
        for point in [*sort_points(section.ranked, sort), *section.unranked]
    ]


def _record(comparison: Comparison, section: Section, point: PointFigures) -> dict[str, Any]:
    spread, ratio = point.spread, point.ratio
    return {
        **section.conditions,
        **point.values,
        "point": point.point,
        "metric": comparison.metric,
        "rank": point.rank,
        "n": spread.n if spread else 0,
        "median": spread.median if spread else None,
        "mad": spread.mad if spread else None,
        "min": spread.least if spread else None,
        "max": spread.largest if spread else None,
        "p95": spread.p95 if spread else None,
        "interval_low": spread.interval.low if spread else None,
        "interval_high": spread.interval.high if spread else None,
        "interval_coverage": spread.interval.coverage if spread else None,
        "baseline": section.baseline.name if section.baseline else None,
        "ratio": ratio.estimate if ratio else None,
        "ratio_low": ratio.interval.low if ratio else None,
        "ratio_high": ratio.interval.high if ratio else None,
        "ratio_coverage": ratio.interval.coverage if ratio else None,
        "p_holm": point.p,
        "ceiling_share": point.ceiling_share,
        "proof": point.level,
        "excluded": point.excluded,
        "outliers": list(spread.outliers) if spread else [],
        "counts": point.counts,
        "problems": point.problems,
    }


def as_csv(comparison: Comparison, sort: str = "rank") -> str:
    """Return the records as CSV; lists and counts are written as JSON."""
    rows = flatten_records(comparison, sort)
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    return out.getvalue()


def as_json(comparison: Comparison, sort: str = "rank", **more: Any) -> str:
    """Return one JSON document: the records, the notes, and what the caller adds."""
    document = {
        "metric": comparison.metric,
        "unit": unit_of(comparison.metric),
        "points": flatten_records(comparison, sort),
    }
    return json.dumps({**document, "notes": comparison.notes, **more}, indent=2, ensure_ascii=False, allow_nan=False)
