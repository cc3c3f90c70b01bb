"""The pictures of a report, as figures of matplotlib: limits, phases, samples, cost of the validation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ladezeit.analysis.attribution import UNATTRIBUTED, phase_medians
from ladezeit.analysis.comparison import Comparison, PointFigures, Section
from ladezeit.analysis.eligibility import format_value as figure_text
from ladezeit.analysis.statistics import Interval
from ladezeit.report import canvas, colors
from ladezeit.report.canvas import MOST_LINEAR_RATIO, Picture
from ladezeit.report.comparison_table import format_percent
from ladezeit.report.fault_catches import Catch
from ladezeit.results.format import NOTHING, format_seconds

_MOST_NAMED = 8
_OTHERS = "shorter phases"
_REST = "unattributed"
_LEGEND_COLUMNS = 5
_LEGEND_ROW_IN = 0.2
_PALETTE = [color for color in colors.COLORS if color != colors.GRAY]

_SPREAD = 0.22

METRIC = "validation/total_s"

_Figure = tuple[float, Interval | None]


@dataclass(frozen=True)
class _Panel:
    """A quantity: its title, its value and interval by row, how it is written, its color, and a limit to mark."""

    title: str
    values: list[_Figure | None]
    text: Callable[[float], str]
    color: str
    limit: float | None = None


def draw_limits(load: Section, gpu_memory: Section, host_memory: Section, name: str) -> Picture | None:
    """Return the picture of a section's ranked points; the sections are those of the same conditions, by metric."""
    points, more = canvas.limit_points(load.ranked)
    panels = [
        _Panel("share of the ceiling", [_share(point) for point in points], format_percent, colors.GREEN, limit=1.0),
        _Panel("peak GPU memory, GiB", _memory(points, gpu_memory), _gib, colors.BLUE),
        _Panel("peak host memory, GiB", _memory(points, host_memory), _gib, colors.SKY),
    ]
    panels = [panel for panel in panels if any(panel.values)]
    if not points or not panels:
        return None
    figure, axes = canvas.rows_figure([point.name for point in points], panels=[1.0] * len(panels), right_in=0.75)
    for own, panel in zip(axes, panels, strict=True):
        _draw_panel(own, panel)
    said = [f"{panel.title}: {_limits_in_words(points, panel)}" for panel in panels]
    return canvas.render_picture(
        figure,
        name,
        alt=f"{load.title}. " + "; ".join(said) + ".",
        caption="Medians; black: interval of the median. The ceiling is what this machine allows, measured in the same "
        f"sweep; the dashed line is all of it.{more}",
    )


def _share(point: PointFigures) -> _Figure | None:
    return None if point.ceiling_share is None else (point.ceiling_share, None)


def _memory(points: Sequence[PointFigures], section: Section) -> list[_Figure | None]:
    spreads = {point.point: point.spread for point in section.ranked}
    found = [spreads.get(point.point) for point in points]
    return [(spread.median, spread.interval) if spread else None for spread in found]


def _gib(value: float) -> str:
    return figure_text(value, "_gib")


def _draw_panel(axes: Any, panel: _Panel) -> None:
    known = [value for value in panel.values if value]
    highest = max([value for value, _ in known] + [within.high for _, within in known if within])
    axes.set_xlim(0, 1.04 * max(highest, panel.limit or 0.0))
    for row, value in enumerate(panel.values):
        if value is None:
            canvas.draw_beside(axes, NOTHING, row, right=True)
            continue
        median, within = value
        axes.barh(row, median, height=0.6, color=panel.color)
        if within and within.coverage > 0:
            axes.plot([within.low, within.high], [row, row], color=canvas.INK, linewidth=1.1)
        canvas.draw_beside(axes, panel.text(median), row, right=True)
    if panel.limit:
        axes.axvline(panel.limit, color=canvas.INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.locator_params(axis="x", nbins=4)
    canvas.draw_heading(axes, panel.title)


def _limits_in_words(points: Sequence[PointFigures], panel: _Panel) -> str:
    pairs = zip(points, panel.values, strict=True)
    return ", ".join(f"{point.name} {panel.text(value[0])}" for point, value in list(pairs)[:8] if value)


# Where the load goes, method by method: the medians of its phases stacked, with what none of them explains.


def phase_palette(points: Sequence[PointFigures]) -> dict[str, str]:
    """Return a color for each of the longest phases of all `points`, the longest first: one phase, one color."""
    largest: dict[str, float] = {}
    for point in points:
        whole_s = sum(phase_medians(point).values())
        for path, spent_s in phase_medians(point).items():
            if path != UNATTRIBUTED and whole_s > 0:
                largest[path] = max(spent_s / whole_s, largest.get(path, 0.0))
    order = sorted(largest, key=lambda path: -largest[path])[:_MOST_NAMED]
    return dict(zip(order, _PALETTE, strict=False))


def draw_phases(section: Section, color_of: Mapping[str, str], name: str) -> Picture | None:
    """Return the picture of a section's ranked points, None where there are none."""
    points, more = canvas.limit_points([point for point in section.ranked if point.spread])
    if not points:
        return None
    bars = [_bar(point, color_of) for point in points]
    totals = [sum(bar.values()) for bar in bars]
    narrow = max(totals) > MOST_LINEAR_RATIO * min(totals)
    figure, axes = canvas.rows_figure([p.name for p in points], panels=(1.0, 0.8) if narrow else (1.0,), right_in=0.7)
    _stack(axes[0], bars, color_of)
    axes[0].set_xlim(0, 1.02 * max([*totals, *(p.spread.median for p in points if p.spread)]))
    axes[0].set_xlabel("seconds", fontsize=8, color=canvas.SOFT_INK)
    for row, point in enumerate(points):
        if point.spread:
            axes[0].plot([point.spread.median] * 2, [row - 0.42, row + 0.42], color=canvas.INK, linewidth=1.6)
            canvas.draw_beside(axes[0], f"{format_seconds(point.spread.median)} s", row, right=True)
    canvas.draw_heading(axes[0], f"{section.title}: phases of the load")
    if narrow:
        _stack(axes[1], [{path: t / sum(bar.values()) * 100 for path, t in bar.items()} for bar in bars], color_of)
        axes[1].set_xlim(0, 100)
        axes[1].set_xlabel("% of the own load", fontsize=8, color=canvas.SOFT_INK)
    _legend(figure, bars, color_of)
    said = "; ".join(_phases_in_words(point, bar) for point, bar in zip(points, bars, strict=True))
    return canvas.render_picture(
        figure,
        name,
        alt=f"Phases of the load, {section.title}: {said}.",
        caption="Medians of each phase's own time, stacked; hatched: unattributed time. Black line: median of the "
        f"whole load, from which the sum of medians may differ a little.{more}",
    )


def _bar(point: PointFigures, color_of: Mapping[str, str]) -> dict[str, float]:
    """Return what is stacked for a point: the named phases in their order, the shorter ones as one, the rest last."""
    times = phase_medians(point)
    named = {path: times[path] for path in color_of if times.get(path)}
    others_s = sum(spent for path, spent in times.items() if path not in color_of and path != UNATTRIBUTED)
    return {**named, _OTHERS: others_s, _REST: times.get(UNATTRIBUTED, 0.0)}


def _stack(axes: Any, bars: Sequence[Mapping[str, float]], color_of: Mapping[str, str]) -> None:
    for row, bar in enumerate(bars):
        left = 0.0
        for path, width in bar.items():
            axes.barh(row, width, left=left, height=0.66, **_style(path, color_of))
            left += width


def _style(path: str, color_of: Mapping[str, str]) -> dict[str, Any]:
    if path == _REST:
        return {"facecolor": "white", "edgecolor": colors.GRAY, "hatch": "////", "linewidth": 0.5}
    return {"facecolor": colors.REST if path == _OTHERS else color_of[path], "edgecolor": "white", "linewidth": 0.5}


def _legend(figure: Any, bars: Sequence[Mapping[str, float]], color_of: Mapping[str, str]) -> None:
    """Name the colors below the axes, in the order in which they are stacked."""
    from matplotlib.patches import Patch

    there = [path for path in (*color_of, _OTHERS, _REST) if any(bar.get(path, 0.0) > 0 for bar in bars)]
    extra_in = _LEGEND_ROW_IN * -(-len(there) // _LEGEND_COLUMNS)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + extra_in)
    for axes in figure.axes:
        box = axes.get_position()
        axes.set_position(
            (
                box.x0,
                (box.y0 * height + extra_in) / (height + extra_in),
                box.width,
                box.height * height / (height + extra_in),
            )
        )
    figure.legend(
        handles=[Patch(label=path.removeprefix("load/"), **_style(path, color_of)) for path in there],
        loc="lower center",
        ncols=_LEGEND_COLUMNS,
        frameon=False,
        fontsize=8,
        handlelength=1.2,
    )


def _phases_in_words(point: PointFigures, bar: Mapping[str, float]) -> str:
    largest = max(bar, key=lambda path: bar[path])
    return f"{point.name} mostly {largest.removeprefix('load/')} ({format_seconds(bar[largest])} s)"


# Every sample as a dot, with the median and its interval: what the ranks rest on.


def draw_samples(comparison: Comparison, section: Section, name: str) -> Picture | None:
    """Return the picture of a section, None where none of its points has a value.

    The order is that of the table: by rank, then those that are not ranked, whose values are hollow.
    """
    metric = comparison.metric
    points, more = canvas.limit_points([point for point in [*section.ranked, *section.unranked] if point.spread])
    if not points:
        return None
    names = [f"{_rank(section, point)}{point.name}" for point in points]
    figure, (axes,) = canvas.rows_figure(names, right_in=1.15)
    values = [point.metric_values(metric) for point in points]
    logarithmic = canvas.seconds_axis(axes, [value for own in values for value in own])
    pixels = canvas.as_pixels(sum(map(len, values)))
    for row, (point, own) in enumerate(zip(points, values, strict=True)):
        trusted = point in section.ranked
        _dots(axes, row, own, _color(point), hollow=not trusted, pixels=pixels)
        _summary(axes, row, point)
        canvas.draw_beside(
            axes, f"{figure_text(point.spread.median if point.spread else None, metric)} s", row, right=True
        )
    canvas.draw_heading(axes, f"{section.title}: load time, every sample")
    return canvas.render_picture(
        figure,
        name,
        alt=f"Load times of {len(points)} methods, {section.title}: {_samples_in_words(points, metric)}.",
        caption="One dot per sample, in measuring order from top to bottom; black: median and its interval. Blue: "
        "the best and what cannot be told apart from it; orange-red: significantly slower; gray: too few samples; "
        f"hollow: not ranked.{' The axis is logarithmic.' if logarithmic else ''}{more}",
    )


def _rank(section: Section, point: PointFigures) -> str:
    if point in section.ranked:
        return f"{point.rank}  " if point.rank is not None else "–  "
    return "not ranked: "


def _color(point: PointFigures) -> str:
    if point.rank is None:
        return colors.GRAY
    return colors.BLUE if point.rank == 1 else colors.VERMILION


def _dots(axes: Any, row: int, values: list[float], color: str, *, hollow: bool, pixels: bool) -> None:
    """Draw the samples of a row one below the other, so that equal ones do not hide each other."""
    step = 2 * _SPREAD / max(1, len(values) - 1)
    heights = [row - _SPREAD + step * index if len(values) > 1 else row for index in range(len(values))]
    fill = "none" if hollow else color
    axes.scatter(
        values, heights, s=16, facecolors=fill, edgecolors=color, linewidths=0.8, alpha=0.75, zorder=2
    ).set_rasterized(pixels)


def _summary(axes: Any, row: int, point: PointFigures) -> None:
    if point.spread is None:
        return
    within = point.spread.interval
    if within.coverage > 0:
        axes.plot([within.low, within.high], [row, row], color=canvas.INK, linewidth=1.1, zorder=3)
    axes.plot([point.spread.median] * 2, [row - 0.33, row + 0.33], color=canvas.INK, linewidth=2.2, zorder=4)


def _samples_in_words(points: list[PointFigures], metric: str) -> str:
    said = [f"{p.name} {figure_text(p.spread.median, metric)} s" for p in points[:8] if p.spread]
    return "medians " + ", ".join(said) + (f" and {len(points) - 8} more" if len(points) > 8 else "")


# What each level of validation costs, beside how many planted faults it finds.


def draw_validation_cost(section: Section, catches: Mapping[str, Catch], name: str) -> Picture | None:
    """Return the picture of a section compared by `METRIC`, cheapest first; None where the level does not vary.

    `catches` are the faults found by level; where it is empty the cost is drawn alone.
    """
    timed = [point for point in [*section.ranked, *section.unranked] if point.spread]
    if len({point.level for point in timed}) < 2:
        return None
    points, more = canvas.limit_points(sorted(timed, key=lambda point: point.spread.median if point.spread else 0.0))
    caught = [catches.get(point.level) for point in points]
    both = any(caught)
    figure, axes = canvas.rows_figure([p.name for p in points], panels=(1.0, 0.7) if both else (1.0,), right_in=0.85)
    _costs(axes[0], points)
    canvas.draw_heading(axes[0], "cost of the validation")
    if both:
        _caught(axes[1], caught)
    pairs = zip(points, caught, strict=True)
    found = [f"{p.name} {_cost(p)}{f', finds {c.found} of {c.of}' if c else ''}" for p, c in pairs]
    return canvas.render_picture(
        figure,
        name,
        alt=f"Cost of validation by level, {section.title}: " + "; ".join(found) + ".",
        caption="What the validation costs: one dot per sample; black: median and its interval."
        + (" Right: how many of the planted faults each level finds; docs/verification.md names them." if both else "")
        + more,
    )


def _cost(point: PointFigures) -> str:
    return f"{format_seconds(point.spread.median)} s" if point.spread else ""


def _costs(axes: Any, points: Sequence[PointFigures]) -> None:
    canvas.seconds_axis(axes, [value for point in points for value in point.metric_values(METRIC)])
    floor = axes.get_xlim()[0]
    for row, point in enumerate(points):
        values = point.metric_values(METRIC)
        axes.scatter([max(floor, value) for value in values], [row] * len(values), s=16, color=colors.ORANGE, alpha=0.7)
        if point.spread and point.spread.median > floor:
            within = point.spread.interval
            axes.plot([max(floor, within.low), within.high], [row, row], color=canvas.INK, linewidth=1.1)
            axes.plot([point.spread.median] * 2, [row - 0.33, row + 0.33], color=canvas.INK, linewidth=2.2)
        canvas.draw_beside(axes, _cost(point), row, right=True)


def _caught(axes: Any, caught: Sequence[Catch | None]) -> None:
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the planted faults", fontsize=8, color=canvas.SOFT_INK)
    for row, catch in enumerate(caught):
        if catch is None:
            canvas.draw_beside(axes, "not known", row, right=True)
            continue
        axes.barh(row, 100 * catch.found / catch.of, height=0.6, color=colors.GREEN)
        canvas.draw_beside(axes, f"{catch.found} of {catch.of}", row, right=True)
    canvas.draw_heading(axes, "faults found")
