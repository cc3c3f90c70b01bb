"""All pictures of a report, section by section."""

from collections.abc import Iterator
from dataclasses import dataclass

from ladezeit.results.report.document import Report
from ladezeit.results.report.plots import limits, phases, strip, timeline, validation_cost
from ladezeit.results.report.plots.canvas import Picture

#: Sections beyond these have tables only.
MOST_SECTIONS = 12


@dataclass(frozen=True)
class Drawn:
    """The pictures of a section: `leading` stand below its answer, `others` below its table."""

    leading: list[Picture]
    others: list[Picture]

    @property
    def all(self) -> list[Picture]:
        """All of them."""
        return [*self.leading, *self.others]


def draw(report: Report, name: str) -> list[Drawn]:
    """Return the pictures of each section; their names begin with `name`."""
    points = [point for section in report.load.sections for point in section.ranked]
    colour_of = phases.palette(points)
    return [
        _of_section(report, index, colour_of, f"{name}-{index + 1}") if index < MOST_SECTIONS else Drawn([], [])
        for index in range(len(report.decisions))
    ]


def _of_section(report: Report, index: int, colour_of: dict[str, str], name: str) -> Drawn:
    load = report.load.sections[index]
    memory = report.section("gpu_memory", index), report.section("host_memory", index)
    leading = [
        strip.draw(report.load, load, f"{name}-samples"),
        validation_cost.draw(report.validation_costs.sections[index], report.catches, f"{name}-validation"),
    ]
    others = [
        phases.draw(load, colour_of, f"{name}-phases"),
        limits.draw(load, *memory, f"{name}-limits"),
        *_timelines(report, index, name),
    ]
    return Drawn([own for own in leading if own], [own for own in others if own])


def _timelines(report: Report, index: int, name: str) -> Iterator[Picture | None]:
    """Yield the timelines of the best point and of the one with the longest load."""
    best = report.decisions[index].load.leader
    ranked = [point for point in report.load.sections[index].ranked if point.spread]
    slowest = max(ranked, key=lambda point: point.spread.median if point.spread else 0.0, default=None)
    if best is not None:
        yield timeline.draw(best, "The best median", f"{name}-timeline-best")
    if slowest is not None and slowest.point != (best.point if best else None):
        yield timeline.draw(slowest, "The slowest", f"{name}-timeline-slowest")
