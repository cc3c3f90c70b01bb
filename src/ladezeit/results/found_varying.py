"""Which config keys tell points apart, found in the results themselves: for results that come from several sweeps."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ladezeit.result import Result
from ladezeit.results.varying import value_of

#: Keys that do not change what is measured (as `ladezeit.config.NOT_MEASURED`, without importing Hydra for it).
NOT_MEASURED = ("sample", "tracking", "order_seed", "discard_first", "ceilings", "outputs", "title", "smaller_model")

_FIRST = {"model": 0, "cache": 1, "loading": 2}


def found_varying(results: Sequence[Result], declared: Sequence[str] = ()) -> list[str]:
    """Return the keys of `declared` and those groups and values that differ between points, in the order of a table.

    A group (``loading``) is named where its options differ; a value inside it (``loading.threads``) where it differs
    between points of the same option.
    """
    points = {result.identity.point: result for result in results}
    keys = list(declared)
    for group in dict.fromkeys(key for result in points.values() for key in result.config):
        if group not in NOT_MEASURED:
            keys += [key for key in _keys_of(group, list(points.values())) if not _covered(key, keys)]
    return sorted(keys, key=lambda key: _FIRST.get(key, 5))


def _covered(key: str, keys: Sequence[str]) -> bool:
    return key in keys or any(known.startswith(f"{key}.") for known in keys)


def _keys_of(group: str, points: list[Result]) -> list[str]:
    by_option: dict[str, dict[str, Any]] = {}
    for result in points:
        value = result.config.get(group)
        by_option.setdefault(value_of(result, group), {})[json.dumps(value, sort_keys=True)] = value
    keys = [group] if len(by_option) > 1 else []
    inner: dict[str, None] = {}
    for values in by_option.values():
        if len(values) > 1 and all(isinstance(value, Mapping) for value in values.values()):
            inner |= dict.fromkeys(_differing(list(values.values())))
    return keys + [f"{group}.{name}" for name in inner]


def _differing(options: list[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for option in options for name in option)
    return [name for name in names if len({json.dumps(option.get(name), sort_keys=True) for option in options}) > 1]
