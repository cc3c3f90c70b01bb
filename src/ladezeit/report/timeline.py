"""The phases of a sample as a picture: the whole sample above, the inside of its load below."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladezeit.analysis.comparison import PointFigures
from ladezeit.analysis.eligibility import LOAD
from ladezeit.report import canvas, colors
from ladezeit.report.canvas import Picture
from ladezeit.results.fields import failure_reason, value_of
from ladezeit.results.format import format_seconds
from ladezeit.results.records import Phase, Result, Status

_WIDTH_IN = 9.0
_ROW_IN = 0.27
_HEADER_IN = 0.62
_PANEL_TITLE_IN = 0.34
_AXIS_IN = 0.5
_DPI = 100
_MOST_ROWS = 24
#: Less is written as 0.000 s.
_LEAST_SHOWN_S = 0.0005

#: By the first word of a phase's path.
_COLORS = {
    "process_start": colors.GRAY,
    "import": colors.GRAY,
    "cuda_context": colors.PINK,
    "load": colors.BLUE,
    "validation": colors.ORANGE,
    "inference": colors.GREEN,
}
_OTHER_COLOR = colors.SKY
_REST_COLOR = colors.REST


@dataclass(frozen=True)
class _Row:
    """One line of a panel: all spans of one phase, in seconds since the panel's zero."""

    name: str
    depth: int
    spans: list[tuple[float, float]]
    total_s: float
    color: str

    @property
    def end_s(self) -> float:
        return max((start + length for start, length in self.spans), default=0.0)


def draw_timeline(result: Result, path: Path) -> None:
    """Write the timeline of `result` as a PNG to `path`; a result without phases gives a picture that says so."""
    figure_of(result).canvas.print_png(str(path))


def figure_of(result: Result) -> Any:
    """Return the timeline of `result` as a figure of matplotlib with a canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(result.phases)
    height = _HEADER_IN + sum(_PANEL_TITLE_IN + _AXIS_IN + _ROW_IN * len(rows) for _, rows in panels)
    figure = Figure(figsize=(_WIDTH_IN, max(height, 1.4)), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.text(0.015, 1 - 0.26 / figure.get_figheight(), _title(result), fontsize=11, weight="bold", va="center")
    if not panels:
        figure.text(0.015, 0.4, f"no phases were recorded: {failure_reason(result)}"[:110], fontsize=9, va="center")
    top = height - _HEADER_IN + 0.1
    left = _left_margin(panels)
    for title, rows in panels:
        bottom = top - _PANEL_TITLE_IN - _ROW_IN * len(rows)
        axes = figure.add_axes((left, bottom / height, 0.975 - left, _ROW_IN * len(rows) / height))
        _draw_panel(axes, title, rows)
        top = bottom - _AXIS_IN
    return figure


def _title(result: Result) -> str:
    parts = [value_of(result, "model"), result.identity.label]
    total = result.metrics.get("load/total_s")
    if total is not None:
        parts.append(f"load {format_seconds(total)} s")
    if result.status is not Status.ok:
        parts.append(result.status.value)
    return " · ".join(part for part in parts if part)


def _panels(phases: Sequence[Phase]) -> list[tuple[str, list[_Row]]]:
    inside = [phase for phase in phases if phase.path.startswith("load/")]
    outside = [phase for phase in phases if not phase.path.startswith("load/")]
    panels = []
    if outside:
        panels.append(("whole sample", _rows(outside, zero_s=0.0)))
    if inside:
        load = [phase for phase in phases if phase.path == "load"]
        zero_s = min(phase.start_s for phase in load or inside)
        rows = _rows(inside, zero_s)
        if load:
            # What no phase of the load accounts for has no place in time: it is drawn from zero, in gray.
            rest_s = sum(phase.self_s for phase in load)
            if rest_s >= _LEAST_SHOWN_S:
                rows.append(_Row("unattributed", 0, [(0.0, rest_s)], rest_s, _REST_COLOR))
        panels.append(("inside the load", rows))
    return panels


def _rows(phases: Sequence[Phase], zero_s: float) -> list[_Row]:
    """Return one row a path in order of first start; where there are too many, the shortest share the last row."""
    by_path: dict[str, list[Phase]] = {}
    for phase in sorted(phases, key=lambda p: (p.start_s, -p.duration_s)):
        by_path.setdefault(phase.path, []).append(phase)
    totals = {path: sum(phase.duration_s for phase in same) for path, same in by_path.items()}
    shown = set(sorted(totals, key=lambda path: -totals[path])[:_MOST_ROWS])
    rows = []
    for path, same in by_path.items():
        if path not in shown:
            continue
        depth = sum(path.startswith(f"{other}/") for other in by_path)
        name = path.removeprefix("load/") if depth == 0 else path.rsplit("/", 1)[-1]
        name += f" ×{len(same)}" if len(same) > 1 else ""
        spans = [(phase.start_s - zero_s, phase.duration_s) for phase in same]
        rows.append(_Row(name, depth, spans, totals[path], _COLORS.get(path.split("/")[0], _OTHER_COLOR)))
    hidden = [path for path in by_path if path not in shown]
    if hidden:
        spans = [(p.start_s - zero_s, p.duration_s) for path in hidden for p in by_path[path]]
        rows.append(_Row(f"{len(hidden)} shorter phases", 0, spans, sum(totals[p] for p in hidden), _REST_COLOR))
    return rows


def _left_margin(panels: list[tuple[str, list[_Row]]]) -> float:
    longest = max((len(row.name) + 2 * row.depth for _, rows in panels for row in rows), default=10)
    return min(0.36, 0.03 + 0.0083 * longest)


def _draw_panel(axes: Any, title: str, rows: list[_Row]) -> None:
    """Draw `rows` from top to bottom, each with its seconds beside its bar, on the side where there is room."""
    end_s = max((row.end_s for row in rows), default=0.0) or 1e-6
    axes.set_xlim(0, end_s * 1.01)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    for index, row in enumerate(rows):
        # A phase too short for a pixel still gets a mark: it was there.
        spans = [(start, max(length, end_s * 0.002)) for start, length in row.spans]
        axes.broken_barh(spans, (index - 0.36, 0.72), facecolors=row.color, linewidth=0)
        to_the_right = row.end_s < 0.86 * end_s
        first = min(start for start, _ in row.spans)
        inside = not to_the_right and first < 0.12 * end_s
        axes.annotate(
            f"{format_seconds(row.total_s)} s",
            (row.end_s if to_the_right or inside else first, index),
            xytext=(4 if to_the_right else -4, 0),
            textcoords="offset points",
            ha="left" if to_the_right else "right",
            va="center",
            fontsize=8,
            color="white" if inside else "#222222",
        )
    axes.set_yticks([])  # real tick labels would take as long to draw as all the rest
    for index, row in enumerate(rows):
        color = "#222222" if row.depth == 0 else "#666666"
        axes.annotate(
            row.name,
            (0, index),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8.5,
            color=color,
            annotation_clip=False,
        )
    axes.set_title(f"{title}, seconds", loc="left", fontsize=9, color="#444444", pad=4)
    axes.tick_params(axis="x", labelsize=8, color="#BBBBBB", labelcolor="#444444")
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")


# The timeline of one sample of a method: the one whose load is nearest to the method's median.


def median_sample(point: PointFigures) -> Result | None:
    """Return the sample of the point whose load is nearest to the median, None where there is none."""
    ok = [result for result in point.samples if result.status is Status.ok and LOAD in result.metrics]
    if not ok or point.spread is None:
        return None
    median_s = point.spread.median
    return min(ok, key=lambda result: (abs(result.metrics[LOAD] - median_s), result.identity.sample))


def draw_point(point: PointFigures, role: str, name: str) -> Picture | None:
    """Return the timeline of the point's median sample; `role` says what the point is (``the best``)."""
    result = median_sample(point)
    if result is None or not result.phases:
        return None
    longest = sorted(result.phases, key=lambda phase: -phase.self_s)[:4]
    said = ", ".join(f"{phase.path} {format_seconds(phase.self_s)} s" for phase in longest)
    return canvas.render_picture(
        figure_of(result),
        name,
        alt=f"Timeline of sample {result.identity.sample} of {point.name}: the longest phases are {said}.",
        caption=f"{role}, {point.name}: its median sample (#{result.identity.sample}, "
        f"{format_seconds(result.metrics[LOAD])} s), from the start of its process.",
    )
