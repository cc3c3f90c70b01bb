"""What a load reached of the machine's limit, and the memory it took: one panel each, where it was measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ladezeit.results import colours
from ladezeit.results.comparison import PointFigures, Section
from ladezeit.results.comparison_table import percent
from ladezeit.results.objectives import figure as figure_text
from ladezeit.results.report.plots import canvas
from ladezeit.results.report.plots.canvas import Picture
from ladezeit.results.seconds import NOTHING
from ladezeit.results.statistics import Interval

_Figure = tuple[float, Interval | None]


@dataclass(frozen=True)
class _Panel:
    """A quantity: its title, its value and interval by row, how it is written, its colour, and a limit to mark."""

    title: str
    values: list[_Figure | None]
    text: Callable[[float], str]
    colour: str
    limit: float | None = None


def draw(load: Section, gpu_memory: Section, host_memory: Section, name: str) -> Picture | None:
    """Return the picture of a section's ranked points; the sections are those of the same conditions, by metric."""
    points, more = canvas.shown(load.ranked)
    panels = [
        _Panel("share of the ceiling", [_share(point) for point in points], percent, colours.GREEN, limit=1.0),
        _Panel("peak GPU memory, GiB", _memory(points, gpu_memory), _gib, colours.BLUE),
        _Panel("peak host memory, GiB", _memory(points, host_memory), _gib, colours.SKY),
    ]
    panels = [panel for panel in panels if any(panel.values)]
    if not points or not panels:
        return None
    figure, axes = canvas.rows_figure([point.name for point in points], panels=[1.0] * len(panels), right_in=0.75)
    for own, panel in zip(axes, panels, strict=True):
        _draw_panel(own, panel)
    said = [f"{panel.title}: {_in_words(points, panel)}" for panel in panels]
    return canvas.picture(
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
            canvas.beside(axes, NOTHING, row, right=True)
            continue
        median, within = value
        axes.barh(row, median, height=0.6, color=panel.colour)
        if within and within.coverage > 0:
            axes.plot([within.low, within.high], [row, row], color=canvas.INK, linewidth=1.1)
        canvas.beside(axes, panel.text(median), row, right=True)
    if panel.limit:
        axes.axvline(panel.limit, color=canvas.INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.locator_params(axis="x", nbins=4)
    canvas.head(axes, panel.title)


def _in_words(points: Sequence[PointFigures], panel: _Panel) -> str:
    pairs = zip(points, panel.values, strict=True)
    return ", ".join(f"{point.name} {panel.text(value[0])}" for point, value in list(pairs)[:8] if value)
