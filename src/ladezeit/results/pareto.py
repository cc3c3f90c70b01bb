"""Several objectives at once: what is best at all of them, or what no other method beats in every respect."""

from collections.abc import Sequence

from ladezeit.results.comparison import PointFigures
from ladezeit.results.standing import NEGLIGIBLE, Standing, State


def together(standings: Sequence[Standing]) -> tuple[list[PointFigures], list[PointFigures]]:
    """Return what is among the best at every objective, and, where nothing is, the front that nobody beats throughout.

    Both are empty where fewer than two objectives could be ranked.
    """
    usable = [standing for standing in standings if standing.state in (State.best, State.shared)]
    grades = [_grades(standing) for standing in usable]
    names = [name for name in (grades[0] if grades else {}) if all(name in own for own in grades)]
    if len(usable) < 2:
        return [], []
    by_name = {point.point: point for point in [*usable[0].best, *usable[0].others]}
    common = [by_name[name] for name in names if all(own[name] == 1 for own in grades)]
    front = [
        name
        for name in names
        if not any(_beats([own[rival] for own in grades], [own[name] for own in grades]) for rival in names)
    ]
    return common, [] if common else [by_name[name] for name in front]


def _beats(one: Sequence[int], other: Sequence[int]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def _grades(standing: Standing) -> dict[str, int]:
    """Return the rank of each point; one that is worse than the best by next to nothing shares its rank."""
    leader = standing.leader
    grades = {}
    for point in [*standing.best, *standing.others]:
        if point.rank is not None and point.spread and leader and leader.spread:
            near = abs(point.spread.median - leader.spread.median) <= NEGLIGIBLE * abs(leader.spread.median)
            grades[point.point] = 1 if near else point.rank
    return grades
