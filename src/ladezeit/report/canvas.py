"""What all pictures of a report share: their type, their size, their type face, and how they become files."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from ladezeit.analysis.comparison import PointFigures
from ladezeit.report.comparison_table import truncate_text

WIDTH_IN = 9.0
ROW_IN = 0.34
INK = "#222222"
SOFT_INK = "#555555"
GRID = "#E6E6E6"
AXIS = "#BBBBBB"

#: A larger ratio between the largest and the smallest value needs a logarithmic axis to show both.
MOST_LINEAR_RATIO = 12.0
#: A picture with more rows is a wall: the table has the rest.
MOST_ROWS = 40

_TOP_IN, _BOTTOM_IN = 0.36, 0.5
_SVG_POINTS = 1500
_MOST_NAME = 44


@dataclass(frozen=True)
class Picture:
    """A drawn picture: `name` is that of its file, `alt` says in words what is seen, `caption` how to read it.

    `svg` and `png` show the same.
    """

    name: str
    alt: str
    caption: str
    svg: bytes
    png: bytes


def rows_figure(names: Sequence[str], *, panels: Sequence[float] = (1.0,), right_in: float = 0.15) -> tuple[Any, Any]:
    """Return a figure with `names` as rows from top to bottom, and its axes side by side.

    Args:
        names: one line each, to the left of the first panel; shortened where they are long.
        panels: the relative widths of the panels, which share the rows.
        right_in: what is kept free to the right of each panel, in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = _TOP_IN + _BOTTOM_IN + ROW_IN * max(1, len(names))
    figure = Figure(figsize=(WIDTH_IN, height))
    FigureCanvasAgg(figure)
    short = [truncate_text(name, _MOST_NAME) for name in names]
    left_in = 0.25 + 0.078 * max(map(len, short), default=10)
    room_in = WIDTH_IN - left_in - right_in * len(panels) - 0.1
    axes = []
    for share in panels:
        width_in = room_in * share / sum(panels)
        box = (left_in / WIDTH_IN, _BOTTOM_IN / height, width_in / WIDTH_IN, ROW_IN * len(names) / height)
        axes.append(_plain(figure.add_axes(box), len(names)))
        left_in += width_in + right_in
    for index, name in enumerate(short):
        draw_beside(axes[0], name, index, color=INK)
    return figure, axes


def _plain(axes: Any, rows: int) -> Any:
    """Take from axes what does not carry meaning."""
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=8, color=AXIS, labelcolor=SOFT_INK)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(AXIS)
    return axes


def draw_beside(axes: Any, text: str, row: int, *, color: str = SOFT_INK, right: bool = False) -> None:
    """Write `text` beside a row: left of the axes, or right of them."""
    axes.annotate(
        text,
        (1.0 if right else 0.0, row),
        xycoords=("axes fraction", "data"),
        xytext=(6 if right else -8, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="center",
        fontsize=8.5,
        color=color,
        annotation_clip=False,
    )


def draw_heading(axes: Any, text: str) -> None:
    """Write what a panel shows above it."""
    axes.set_title(text, loc="left", fontsize=9, color=SOFT_INK, pad=5)


def seconds_axis(axes: Any, values: Sequence[float]) -> bool:
    """Fit the axis to seconds, from zero, or logarithmic where that is needed to see all; returns whether it is."""
    positive = [value for value in values if value > 0]
    most = max(positive, default=1.0)
    logarithmic = bool(positive) and most / min(positive) > MOST_LINEAR_RATIO
    if logarithmic:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_xscale("log")
        axes.set_xlim(min(positive) / 1.25, most * 1.25)
        narrow = most / min(positive) < 100
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.9f}".rstrip("0").rstrip(".")))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, most * 1.04)
    axes.set_xlabel("seconds, logarithmic" if logarithmic else "seconds", fontsize=8, color=SOFT_INK)
    return logarithmic


def limit_points(points: Sequence[PointFigures]) -> tuple[list[PointFigures], str]:
    """Return as many points as a picture holds, and a sentence about those that it does not."""
    left = len(points) - MOST_ROWS
    return list(points[:MOST_ROWS]), f" {left} more are in the table only." if left > 0 else ""


def render_picture(figure: Any, name: str, alt: str, caption: str) -> Picture:
    """Return the figure as a picture; equal figures give equal bytes."""
    from matplotlib import rc_context

    vector, pixels = BytesIO(), BytesIO()
    with rc_context({"svg.hashsalt": "ladezeit", "svg.fonttype": "path"}):
        figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None}, dpi=150)
    figure.savefig(pixels, format="png", dpi=150, metadata={"Software": None})
    return Picture(name, alt, caption, vector.getvalue(), pixels.getvalue())


def as_pixels(count: int) -> bool:
    """Say whether so many marks are drawn as pixels even in a vector file, which they would make huge."""
    return count > _SVG_POINTS
