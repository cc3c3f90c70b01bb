"""The timeline of one sample of a method: the one whose load is nearest to the method's median."""

from ladezeit.result import Result, Status
from ladezeit.results import timeline
from ladezeit.results.comparison import PointFigures
from ladezeit.results.objectives import LOAD
from ladezeit.results.report.plots import canvas
from ladezeit.results.report.plots.canvas import Picture
from ladezeit.results.seconds import seconds


def median_sample(point: PointFigures) -> Result | None:
    """Return the sample of the point whose load is nearest to the median, None where there is none."""
    ok = [result for result in point.samples if result.status is Status.ok and LOAD in result.metrics]
    if not ok or point.spread is None:
        return None
    median_s = point.spread.median
    return min(ok, key=lambda result: (abs(result.metrics[LOAD] - median_s), result.identity.sample))


def draw(point: PointFigures, role: str, name: str) -> Picture | None:
    """Return the timeline of the point's median sample; `role` says what the point is (``the best``)."""
    result = median_sample(point)
    if result is None or not result.phases:
        return None
    longest = sorted(result.phases, key=lambda phase: -phase.self_s)[:4]
    said = ", ".join(f"{phase.path} {seconds(phase.self_s)} s" for phase in longest)
    return canvas.picture(
        timeline.figure_of(result),
        name,
        alt=f"Timeline of sample {result.identity.sample} of {point.name}: the longest phases are {said}.",
        caption=f"{role}, {point.name}: its median sample (#{result.identity.sample}, "
        f"{seconds(result.metrics[LOAD])} s), from the start of its process.",
    )
