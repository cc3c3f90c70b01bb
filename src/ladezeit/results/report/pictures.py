"""All pictures of a report, section by section."""

from collections.abc import Iterator

from ladezeit.results.report.document import Report
from ladezeit.results.report.plots import limits, phases, strip, timeline, validation_cost
from ladezeit.results.report.plots.canvas import Picture

#: Sections beyond these have tables only.
MOST_SECTIONS = 12


def draw(report: Report, name: str) -> list[list[Picture]]:
    """Return the pictures of each section, in the order in which they are shown; their names begin with `name`."""
    points = [point for section in report.load.sections for point in section.ranked]
    colour_of = phases.palette(points)
    drawn: list[list[Picture]] = []
    for index in range(len(report.decisions)):
        wanted = index < MOST_SECTIONS
        drawn.append(list(_of_section(report, index, colour_of, f"{name}-{index + 1}")) if wanted else [])
    return drawn


def _of_section(report: Report, index: int, colour_of: dict[str, str], name: str) -> Iterator[Picture]:
    load = report.load.sections[index]
    costs = report.validation_costs.sections[index]
    found = [
        strip.draw(report.load, load, f"{name}-samples"),
        validation_cost.draw(costs, report.catches, f"{name}-validation"),
        phases.draw(load, colour_of, f"{name}-phases"),
        limits.draw(load, report.section("gpu_memory", index), report.section("host_memory", index), f"{name}-limits"),
        *_timelines(report, index, name),
    ]
    yield from (picture for picture in found if picture is not None)


def _timelines(report: Report, index: int, name: str) -> Iterator[Picture | None]:
    """Yield the timelines of the best point and of the one with the longest load."""
    best = report.decisions[index].load.leader
    ranked = [point for point in report.load.sections[index].ranked if point.spread]
    slowest = max(ranked, key=lambda point: point.spread.median if point.spread else 0.0, default=None)
    if best is not None:
        yield timeline.draw(best, "The best median", f"{name}-timeline-best")
    if slowest is not None and slowest.point != (best.point if best else None):
        yield timeline.draw(slowest, "The slowest", f"{name}-timeline-slowest")
