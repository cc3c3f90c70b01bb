"""What each level of validation costs, beside how many planted faults it finds."""

from collections.abc import Mapping, Sequence
from typing import Any

from ladezeit.results import colours
from ladezeit.results.comparison import PointFigures, Section
from ladezeit.results.report.fault_catches import Catch
from ladezeit.results.report.plots import canvas
from ladezeit.results.report.plots.canvas import Picture
from ladezeit.results.seconds import seconds

METRIC = "validation/total_s"


def draw(section: Section, catches: Mapping[str, Catch], name: str) -> Picture | None:
    """Return the picture of a section compared by `METRIC`, cheapest first; None where the level does not vary.

    `catches` are the faults found by level; where it is empty the cost is drawn alone.
    """
    timed = [point for point in [*section.ranked, *section.apart] if point.spread]
    if len({point.level for point in timed}) < 2:
        return None
    points, more = canvas.shown(sorted(timed, key=lambda point: point.spread.median if point.spread else 0.0))
    caught = [catches.get(point.level) for point in points]
    both = any(caught)
    figure, axes = canvas.rows_figure([p.name for p in points], panels=(1.0, 0.7) if both else (1.0,), right_in=0.85)
    _costs(axes[0], points)
    canvas.head(axes[0], "cost of the validation")
    if both:
        _caught(axes[1], caught)
    pairs = zip(points, caught, strict=True)
    found = [f"{p.name} {_cost(p)}{f', finds {c.found} of {c.of}' if c else ''}" for p, c in pairs]
    return canvas.picture(
        figure,
        name,
        alt=f"Cost of validation by level, {section.title}: " + "; ".join(found) + ".",
        caption="What the validation costs: a dot a sample, black: median and its interval."
        + (" Right: how many of the planted faults each level finds; docs/proof.md names them." if both else "")
        + more,
    )


def _cost(point: PointFigures) -> str:
    return f"{seconds(point.spread.median)} s" if point.spread else ""


def _costs(axes: Any, points: Sequence[PointFigures]) -> None:
    canvas.seconds_axis(axes, [value for point in points for value in point.measured(METRIC)])
    floor = axes.get_xlim()[0]
    for row, point in enumerate(points):
        values = point.measured(METRIC)
        axes.scatter(
            [max(floor, value) for value in values], [row] * len(values), s=16, color=colours.ORANGE, alpha=0.7
        )
        if point.spread and point.spread.median > floor:
            within = point.spread.interval
            axes.plot([max(floor, within.low), within.high], [row, row], color=canvas.INK, linewidth=1.1)
            axes.plot([point.spread.median] * 2, [row - 0.33, row + 0.33], color=canvas.INK, linewidth=2.2)
        canvas.beside(axes, _cost(point), row, right=True)


def _caught(axes: Any, caught: Sequence[Catch | None]) -> None:
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the planted faults", fontsize=8, color=canvas.SOFT_INK)
    for row, catch in enumerate(caught):
        if catch is None:
            canvas.beside(axes, "not known", row, right=True)
            continue
        axes.barh(row, 100 * catch.found / catch.of, height=0.6, color=colours.GREEN)
        canvas.beside(axes, f"{catch.found} of {catch.of}", row, right=True)
    canvas.head(axes, "faults found")
