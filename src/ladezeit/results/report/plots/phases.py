"""Where the load goes, method by method: the medians of its phases stacked, with what none of them explains."""

from collections.abc import Mapping, Sequence
from typing import Any

from ladezeit.results import colours
from ladezeit.results.attribution import phase_medians
from ladezeit.results.comparison import PointFigures, Section
from ladezeit.results.difference import UNATTRIBUTED
from ladezeit.results.report.plots import canvas
from ladezeit.results.report.plots.canvas import MOST_LINEAR_RATIO, Picture
from ladezeit.results.seconds import seconds

_MOST_NAMED = 8
_OTHERS = "shorter phases"
_REST = "unattributed"
_LEGEND_COLUMNS = 5
_LEGEND_ROW_IN = 0.2
_PALETTE = [colour for colour in colours.COLOURS if colour != colours.GREY]


def palette(points: Sequence[PointFigures]) -> dict[str, str]:
    """Return a colour for each of the longest phases of all `points`, the longest first: one phase, one colour."""
    largest: dict[str, float] = {}
    for point in points:
        whole_s = sum(phase_medians(point).values())
        for path, spent_s in phase_medians(point).items():
            if path != UNATTRIBUTED and whole_s > 0:
                largest[path] = max(spent_s / whole_s, largest.get(path, 0.0))
    order = sorted(largest, key=lambda path: -largest[path])[:_MOST_NAMED]
    return dict(zip(order, _PALETTE, strict=False))


def draw(section: Section, colour_of: Mapping[str, str], name: str) -> Picture | None:
    """Return the picture of a section's ranked points, None where there are none."""
    points, more = canvas.shown([point for point in section.ranked if point.spread])
    if not points:
        return None
    bars = [_bar(point, colour_of) for point in points]
    totals = [sum(bar.values()) for bar in bars]
    narrow = max(totals) > MOST_LINEAR_RATIO * min(totals)
    figure, axes = canvas.rows_figure([p.name for p in points], panels=(1.0, 0.8) if narrow else (1.0,), right_in=0.7)
    _stack(axes[0], bars, colour_of)
    axes[0].set_xlim(0, 1.02 * max([*totals, *(p.spread.median for p in points if p.spread)]))
    axes[0].set_xlabel("seconds", fontsize=8, color=canvas.SOFT_INK)
    for row, point in enumerate(points):
        if point.spread:
            axes[0].plot([point.spread.median] * 2, [row - 0.42, row + 0.42], color=canvas.INK, linewidth=1.6)
            canvas.beside(axes[0], f"{seconds(point.spread.median)} s", row, right=True)
    canvas.head(axes[0], f"{section.title}: phases of the load")
    if narrow:
        _stack(axes[1], [{path: t / sum(bar.values()) * 100 for path, t in bar.items()} for bar in bars], colour_of)
        axes[1].set_xlim(0, 100)
        axes[1].set_xlabel("% of the own load", fontsize=8, color=canvas.SOFT_INK)
    _legend(figure, bars, colour_of)
    said = "; ".join(_in_words(point, bar) for point, bar in zip(points, bars, strict=True))
    return canvas.picture(
        figure,
        name,
        alt=f"Phases of the load, {section.title}: {said}.",
        caption="Medians of each phase's own time, stacked; hatched: what no phase explains. Black line: median of the "
        f"whole load, from which the sum of medians may differ a little.{more}",
    )


def _bar(point: PointFigures, colour_of: Mapping[str, str]) -> dict[str, float]:
    """Return what is stacked for a point: the named phases in their order, the shorter ones as one, the rest last."""
    times = phase_medians(point)
    named = {path: times[path] for path in colour_of if times.get(path)}
    others_s = sum(spent for path, spent in times.items() if path not in colour_of and path != UNATTRIBUTED)
    return {**named, _OTHERS: others_s, _REST: times.get(UNATTRIBUTED, 0.0)}


def _stack(axes: Any, bars: Sequence[Mapping[str, float]], colour_of: Mapping[str, str]) -> None:
    for row, bar in enumerate(bars):
        left = 0.0
        for path, width in bar.items():
            axes.barh(row, width, left=left, height=0.66, **_style(path, colour_of))
            left += width


def _style(path: str, colour_of: Mapping[str, str]) -> dict[str, Any]:
    if path == _REST:
        return {"facecolor": "white", "edgecolor": colours.GREY, "hatch": "////", "linewidth": 0.5}
    return {"facecolor": colours.REST if path == _OTHERS else colour_of[path], "edgecolor": "white", "linewidth": 0.5}


def _legend(figure: Any, bars: Sequence[Mapping[str, float]], colour_of: Mapping[str, str]) -> None:
    """Name the colours below the axes, in the order in which they are stacked."""
    from matplotlib.patches import Patch

    there = [path for path in (*colour_of, _OTHERS, _REST) if any(bar.get(path, 0.0) > 0 for bar in bars)]
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
        handles=[Patch(label=path.removeprefix("load/"), **_style(path, colour_of)) for path in there],
        loc="lower center",
        ncols=_LEGEND_COLUMNS,
        frameon=False,
        fontsize=8,
        handlelength=1.2,
    )


def _in_words(point: PointFigures, bar: Mapping[str, float]) -> str:
    largest = max(bar, key=lambda path: bar[path])
    return f"{point.name} mostly {largest.removeprefix('load/')} ({seconds(bar[largest])} s)"
