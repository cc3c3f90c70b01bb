"""Every sample as a dot, with the median and its interval: what the ranks rest on."""

from typing import Any

from ladezeit.results import colours
from ladezeit.results.comparison import Comparison, PointFigures, Section
from ladezeit.results.objectives import figure as figure_text
from ladezeit.results.report.plots import canvas
from ladezeit.results.report.plots.canvas import Picture

_SPREAD = 0.22


def draw(comparison: Comparison, section: Section, name: str) -> Picture | None:
    """Return the picture of a section, None where none of its points has a value.

    The order is that of the table: by rank, then those that are not ranked, whose values are hollow.
    """
    metric = comparison.metric
    points, more = canvas.shown([point for point in [*section.ranked, *section.apart] if point.spread])
    if not points:
        return None
    names = [f"{_rank(section, point)}{point.name}" for point in points]
    figure, (axes,) = canvas.rows_figure(names, right_in=1.15)
    values = [point.measured(metric) for point in points]
    logarithmic = canvas.seconds_axis(axes, [value for own in values for value in own])
    pixels = canvas.as_pixels(sum(map(len, values)))
    for row, (point, own) in enumerate(zip(points, values, strict=True)):
        trusted = point in section.ranked
        _dots(axes, row, own, _colour(point), hollow=not trusted, pixels=pixels)
        _summary(axes, row, point)
        canvas.beside(axes, f"{figure_text(point.spread.median if point.spread else None, metric)} s", row, right=True)
    canvas.head(axes, f"{section.title}: load time, every sample")
    return canvas.picture(
        figure,
        name,
        alt=f"Load times of {len(points)} methods, {section.title}: {_in_words(points, metric)}.",
        caption="One dot a sample, in the order of measuring from top to bottom; black: median and its interval. Blue: "
        "the best and what cannot be told apart from it; orange-red: proven slower; grey: too few samples to rank; "
        f"hollow: not ranked.{' The axis is logarithmic.' if logarithmic else ''}{more}",
    )


def _rank(section: Section, point: PointFigures) -> str:
    if point in section.ranked:
        return f"{point.rank}  " if point.rank is not None else "–  "
    return "not ranked: "


def _colour(point: PointFigures) -> str:
    if point.rank is None:
        return colours.GREY
    return colours.BLUE if point.rank == 1 else colours.VERMILION


def _dots(axes: Any, row: int, values: list[float], colour: str, *, hollow: bool, pixels: bool) -> None:
    """Draw the samples of a row one below the other, so that equal ones do not hide each other."""
    step = 2 * _SPREAD / max(1, len(values) - 1)
    heights = [row - _SPREAD + step * index if len(values) > 1 else row for index in range(len(values))]
    fill = "none" if hollow else colour
    axes.scatter(
        values, heights, s=16, facecolors=fill, edgecolors=colour, linewidths=0.8, alpha=0.75, zorder=2
    ).set_rasterized(pixels)


def _summary(axes: Any, row: int, point: PointFigures) -> None:
    if point.spread is None:
        return
    within = point.spread.interval
    if within.coverage > 0:
        axes.plot([within.low, within.high], [row, row], color=canvas.INK, linewidth=1.1, zorder=3)
    axes.plot([point.spread.median] * 2, [row - 0.33, row + 0.33], color=canvas.INK, linewidth=2.2, zorder=4)


def _in_words(points: list[PointFigures], metric: str) -> str:
    said = [f"{p.name} {figure_text(p.spread.median, metric)} s" for p in points[:8] if p.spread]
    return "medians " + ", ".join(said) + (f" and {len(points) - 8} more" if len(points) > 8 else "")
