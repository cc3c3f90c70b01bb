"""The table at the end of a sweep: what `compare` shows without its tests, and what a load costs besides time.

One line a configuration, shortest load first among those that may be compared with each other.
"""

import statistics
from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from ladezeit.analysis.comparison import CONDITIONS, Comparison, PointFigures, compare_points
from ladezeit.analysis.eligibility import LOAD, format_value
from ladezeit.errors import LadezeitError
from ladezeit.report.comparison_table import (
    Column,
    counts_text,
    coverage_of,
    draw_table,
    escape_cell,
    format_percent,
    interval_text,
    markdown_table,
    truncate_text,
)
from ladezeit.results.fields import value_of
from ladezeit.results.format import NOTHING
from ladezeit.results.records import Result

_MACHINE = "machine"
_GPU, _HOST = "GPU GiB", "host GiB"

#: Medians that are shown where a configuration has them; the host's memory where there is no GPU's.
_COSTS = {
    "first token s": "inference/first_token_s",
    "start to token s": "cold_start/first_token_s",
    _GPU: "memory/gpu_allocated_peak_gib",
    _HOST: "memory/host_peak_rss_gib",
    "validation s": "validation/total_s",
}


def as_rich(results: Sequence[Result], varying: Sequence[str]) -> RenderableType:
    """Return the table for a terminal; `varying` are the config keys that tell the configurations apart."""
    compared = _compare(results, varying)
    sections, keys = _sections(compared), _keys(compared, varying)
    table = draw_table(_title(sections, keys), _columns(sections, keys), sections)
    problems = (f"[yellow]not ok[/yellow]  {escape(line)}" for line in _problems(sections, keys))
    return Group(table, Text(_legend(sections), style="italic dim"), *problems)


def sweep_as_markdown(results: Sequence[Result], varying: Sequence[str]) -> str:
    """Return the table as Markdown, for MLflow's description of the sweep and for reports."""
    compared = _compare(results, varying)
    sections, keys = _sections(compared), _keys(compared, varying)
    points = [point for section in sections for point in section]
    parts = [f"**{escape_cell(_title(sections, keys))}**", markdown_table(_columns(sections, keys), points)]
    parts.append(_legend(sections))
    if problems := _problems(sections, keys):
        parts.append("\n".join(f"- not ok: {escape_cell(problem)}" for problem in problems))
    return "\n\n".join(parts) + "\n"


def _compare(results: Sequence[Result], varying: Sequence[str]) -> Comparison:
    try:
        return compare_points(results, varying)
    except LadezeitError:  # a launcher had its jobs run on several machines
        return compare_points(results, varying, across_machines=True)


def _sections(compared: Comparison) -> list[list[PointFigures]]:
    def load_s(point: PointFigures) -> tuple[bool, float]:
        return point.spread is None, point.spread.median if point.spread else 0.0

    return [sorted([*section.ranked, *section.unranked], key=load_s) for section in compared.sections]


def _keys(compared: Comparison, varying: Sequence[str]) -> list[str]:
    return [key for key in varying if key != "sample"] + [key for key in compared.keys if key == _MACHINE]


def _value(point: PointFigures, key: str) -> str:
    return (point.values[key] if key == _MACHINE else value_of(point.samples[0], key)) or NOTHING


def _columns(sections: Sequence[Sequence[PointFigures]], keys: Sequence[str]) -> list[Column]:
    points = [point for section in sections for point in section]

    def key_column(key: str) -> Column:
        return Column(key, lambda point: _value(point, key), left=True)

    found = [key_column(key) for key in keys] or [Column("configuration", lambda point: "all", left=True)]
    found += [
        Column("n", lambda point: str(point.spread.n if point.spread else 0)),
        Column("load s", lambda point: format_value(point.spread.median if point.spread else None, LOAD)),
        Column("interval", lambda point: interval_text(point, LOAD)),
    ]
    if any(point.ceiling_share is not None for point in points):
        found.append(Column("of ceiling", lambda point: format_percent(point.ceiling_share)))
    known = {head for head, metric in _COSTS.items() if any(point.metric_values(metric) for point in points)}
    known -= {_HOST} if _GPU in known else set()
    found += [Column(head, _cost(metric)) for head, metric in _COSTS.items() if head in known]
    return [*found, Column("status", counts_text, left=True, least_width=len("1 skipped"))]


def _cost(metric: str) -> Callable[[PointFigures], str]:
    def cell(point: PointFigures) -> str:
        values = point.metric_values(metric)
        return format_value(statistics.median(values) if values else None, metric)

    return cell


def _title(sections: Sequence[Sequence[PointFigures]], keys: Sequence[str]) -> str:
    fixed = []
    for key in CONDITIONS[:2]:
        values = {value_of(point.samples[0], key) for section in sections for point in section}
        fixed += [f"{key} {values.pop()}"] if key not in keys and len(values) == 1 else []
    return " · ".join(["Load times", *fixed])


def _problems(sections: Sequence[Sequence[PointFigures]], keys: Sequence[str]) -> list[str]:
    lines = []
    for point in (point for section in sections for point in section):
        name = " · ".join(_value(point, key) for key in keys) or point.point
        lines += [f"{name}: {truncate_text(problem)}" for problem in point.problems]
    return lines


def _legend(sections: Sequence[Sequence[PointFigures]]) -> str:
    spreads = [point.spread for section in sections for point in section if point.spread]
    if not spreads:
        return "No sample is ok: there is nothing to compare."
    return f"Medians of the ok samples. {coverage_of(spreads)}"
