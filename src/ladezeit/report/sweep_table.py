"""The table at the end of a sweep: one line a point, best first within the same model and cache state."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ladezeit.analysis.statistics import Spread
from ladezeit.results.fields import failure_reason, metric_of, value_of, varying_values
from ladezeit.results.format import NOTHING as _NOTHING
from ladezeit.results.format import format_seconds
from ladezeit.results.records import Result, Status

_MOST_REASON = 160


@dataclass(frozen=True)
class _Cells:
    """The table as text, before it is drawn: sections are groups of lines that may be compared with each other."""

    title: str
    header: list[str]
    text_columns: int
    sections: list[list[list[str]]]
    problems: list[str]
    legend: str


def as_rich(results: Sequence[Result], varying: Sequence[str]) -> RenderableType:
    """Return the table for a terminal; `varying` are the config keys that tell the points apart."""
    cells = _cells(results, varying)
    table = Table(
        title=escape(cells.title),
        title_justify="left",
        caption=cells.legend,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, name in enumerate(cells.header):
        figure = index >= cells.text_columns and name != "status"
        # A figure that is broken over two lines is a wrong figure: names give way where the terminal is narrow.
        head = escape("\n".join(name.split()) if figure else name)
        least = len("1 skipped") if name == "status" else None
        table.add_column(
            head,
            justify="right" if figure else "left",
            no_wrap=figure,
            min_width=least,
            overflow="fold",
            vertical="top",
        )
    for section in cells.sections:
        for row in section:
            table.add_row(*(escape(cell) for cell in row))
        table.add_section()
    return Group(table, *(f"[yellow]not ok[/yellow]  {escape(problem)}" for problem in cells.problems))


def sweep_as_markdown(results: Sequence[Result], varying: Sequence[str]) -> str:
    """Return the table as Markdown, for MLflow's description of the sweep and for reports."""
    cells = _cells(results, varying)
    ruler = [":--" if i < cells.text_columns or n == "status" else "--:" for i, n in enumerate(cells.header)]
    rows = [row for section in cells.sections for row in section]
    lines = ["| " + " | ".join(_plain(cell) for cell in line) + " |" for line in (cells.header, ruler, *rows)]
    parts = [f"**{_plain(cells.title)}**", "\n".join(lines), cells.legend]
    if cells.problems:
        parts.append("\n".join(f"- not ok: {_plain(problem)}" for problem in cells.problems))
    return "\n\n".join(parts) + "\n"


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _cells(results: Sequence[Result], varying: Sequence[str]) -> _Cells:
    points = summarize_points(results, varying)
    keys = [key for key in varying if key != "sample"]
    columns = _columns(points)
    sections: dict[tuple[str, str], list[list[str]]] = {}
    for point in points:
        row = [point.values[key] or _NOTHING for key in keys] or ["all"]
        row += [column(point) for column in columns.values()]
        sections.setdefault((point.model, point.cache), []).append(row)
    return _Cells(
        title=_title(points, keys),
        header=(keys or ["configuration"]) + list(columns),
        text_columns=max(1, len(keys)),
        sections=list(sections.values()),
        problems=[line for point in points for line in _problems(point)],
        legend=_legend(points),
    )


# Samples grouped by point, with the medians a table shows.


@dataclass(frozen=True)
class PointSummary:
    """The samples of one point; figures come from its `ok` samples alone and are None where none has them."""

    point: str
    model: str
    cache: str
    values: dict[str, str]
    counts: dict[Status, int]
    problems: dict[tuple[Status, str], int]
    load_s: Spread | None
    ceiling_share: float | None
    cold_start_s: float | None
    first_token_s: float | None
    gpu_memory_gib: float | None
    host_memory_gib: float | None
    validation_s: float | None

    @property
    def n(self) -> int:
        """How many samples are `ok`."""
        return self.counts.get(Status.ok, 0)


def _columns(points: Sequence[PointSummary]) -> dict[str, Callable[[PointSummary], str]]:
    """Return header and cell of every figure that at least one point has."""
    columns: dict[str, Callable[[PointSummary], str]] = {
        "n": lambda point: str(point.n),
        "load s": lambda point: format_seconds(point.load_s.median if point.load_s else None),
        "min–max": _range,
    }
    if any(point.ceiling_share is not None for point in points):
        columns["of ceiling"] = lambda point: _percent(point.ceiling_share)
    if any(point.first_token_s is not None for point in points):
        columns["first token s"] = lambda point: format_seconds(point.first_token_s)
    if any(point.cold_start_s is not None for point in points):
        columns["start to token s"] = lambda point: format_seconds(point.cold_start_s)
    if any(point.gpu_memory_gib is not None for point in points):
        columns["GPU GiB"] = lambda point: _two_digits(point.gpu_memory_gib)
    elif any(point.host_memory_gib is not None for point in points):
        columns["host GiB"] = lambda point: _two_digits(point.host_memory_gib)
    if any(point.validation_s is not None for point in points):
        columns["validation s"] = lambda point: format_seconds(point.validation_s)
    columns["status"] = _status
    return columns


def _range(point: PointSummary) -> str:
    load = point.load_s
    return f"{format_seconds(load.least)}–{format_seconds(load.largest)}" if load and load.n > 1 else _NOTHING


def _two_digits(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    if share is None:
        return _NOTHING
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def _status(point: PointSummary) -> str:
    return ", ".join(f"{point.counts[status]} {status.value}" for status in Status if status in point.counts)


def _title(points: Sequence[PointSummary], keys: Sequence[str]) -> str:
    fixed = []
    for key, values in (("model", {p.model for p in points}), ("cache", {p.cache for p in points})):
        if key not in keys and len(values) == 1:
            fixed.append(f"{key} {values.pop()}")
    return " · ".join(["Load times", *fixed])


def _problems(point: PointSummary) -> list[str]:
    name = " · ".join(point.values.values()) or point.point
    lines = []
    for (status, reason), count in point.problems.items():
        cut = reason if len(reason) <= _MOST_REASON else reason[: _MOST_REASON - 1] + "…"
        lines.append(f"{name}: {count} {status.value}: {cut}")
    return lines


def _legend(points: Sequence[PointSummary]) -> str:
    spreads = sorted({point.load_s.n for point in points if point.load_s})
    if not spreads:
        return "No sample is ok: there is nothing to compare."
    text = "Medians of the ok samples"
    if spreads[0] == 1:
        return f"{text}; one sample per configuration says nothing about the spread."
    ns = f"n = {spreads[0]}" if len(spreads) == 1 else f"n = {spreads[0]} (the fewest)"
    covers = f"a probability of {100 * range_coverage(spreads[0]):.1f} % at {ns}"
    return f"{text}; min–max covers the true median of the load with {covers}."


def range_coverage(n: int) -> float:
    """Return the probability with which the range of `n` independent values covers their true median."""
    return 1 - 2.0 ** (1 - n)


def summarize_points(results: Sequence[Result], varying: Sequence[str]) -> list[PointSummary]:
    """Group `results` by point, sorted by model, cache state and load median; points without a median come last."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.identity.point, []).append(result)
    summaries = [_summary(group, varying) for group in groups.values()]
    return sorted(
        summaries,
        key=lambda s: (s.model, s.cache, s.load_s is None, s.load_s.median if s.load_s else 0.0, str(s.values)),
    )


def _summary(group: list[Result], varying: Sequence[str]) -> PointSummary:
    first = group[0]
    return PointSummary(
        point=first.identity.point,
        model=value_of(first, "model"),
        cache=value_of(first, "cache"),
        values=varying_values(first, varying),
        counts=dict(Counter(result.status for result in group)),
        problems=dict(Counter((r.status, failure_reason(r)) for r in group if r.status is not Status.ok)),
        load_s=Spread.from_values(metric_of(group, "load/total_s")),
        ceiling_share=_median(group, "load/ceiling_share"),
        cold_start_s=_median(group, "cold_start/first_token_s"),
        first_token_s=_median(group, "inference/first_token_s"),
        gpu_memory_gib=_median(group, "memory/gpu_allocated_peak_gib"),
        host_memory_gib=_median(group, "memory/host_peak_rss_gib"),
        validation_s=_median(group, "validation/total_s"),
    )


def _median(group: Sequence[Result], name: str) -> float | None:
    spread = Spread.from_values(metric_of(group, name))
    return spread.median if spread else None
