"""Which points of the new results are which of the baseline's, also where a newer ladezeit knows more options."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ladezeit.result import Result
from ladezeit.results.found_varying import NOT_MEASURED

#: Every option of a config, by group and name.
_Flat = dict[str, str]


@dataclass(frozen=True)
class Pair:
    """The samples of one point before and now; one side is empty where the point is missing there.

    `unknown_before` are the options that only one side's config has: the points agree in all others.
    """

    before: list[Result]
    now: list[Result]
    unknown_before: list[str]


def pairs(before: Sequence[Result], now: Sequence[Result]) -> list[Pair]:
    """Return the points of both sides, the baseline's first and in its order, then those that are new.

    Points are the same where their ids are. A ladezeit with more or fewer options gives other ids: then two points are
    the same where they agree in every option that both know, and no other point of either side does so too.
    """
    old, new = _by_point(before), _by_point(now)
    partner = {point: point for point in old if point in new}
    flat = {point: _flat(samples[0].config) for side in (old, new) for point, samples in side.items()}
    alone = {point: flat[point] for point in old if point not in partner}
    free = {point: flat[point] for point in new if point not in partner}
    for point, config in alone.items():
        fitting = [other for other, known in free.items() if _agree(config, known)]
        if len(fitting) == 1 and sum(_agree(free[fitting[0]], known) for known in alone.values()) == 1:
            partner[point] = fitting[0]
    found = []
    for point, samples in old.items():
        other = partner.get(point)
        unknown = sorted(flat[point].keys() ^ flat[other].keys()) if other else []
        found.append(Pair(samples, new[other] if other else [], unknown))
    taken = set(partner.values())
    return found + [Pair([], samples, []) for point, samples in new.items() if point not in taken]


def _by_point(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.identity.point, []).append(result)
    return groups


def _agree(one: _Flat, other: _Flat) -> bool:
    """Say whether all options that both know are equal; two configs without a common option do not agree."""
    common = one.keys() & other.keys()
    return bool(common) and all(one[key] == other[key] for key in common)


def _flat(config: Mapping[str, Any]) -> _Flat:
    return dict(_options({key: value for key, value in config.items() if key not in NOT_MEASURED}))


def _options(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield ``group.option`` and its value; what lies deeper (a device map) is one value, so that it differs as one."""
    for group, node in config.items():
        inner = node.items() if isinstance(node, Mapping) else [("", node)]
        for name, value in inner:
            yield f"{group}.{name}".rstrip("."), json.dumps(value, sort_keys=True, default=str)
