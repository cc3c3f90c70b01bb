"""What a sweep varied, read back from a result: config keys and the value each has in a sample."""

import json
from collections.abc import Sequence
from typing import Any

from ladezeit.result import Result

#: The field of an option group that says which option was chosen, in the order they are looked for.
_NAMING_FIELDS = ("name", "state", "level", "kind")


def varying_values(result: Result, varying: Sequence[str]) -> dict[str, str]:
    """Return each key of `varying` with its value as a person would type it (``{"loading": "streamed"}``).

    A group's value is the name of the chosen option. ``sample`` is left out: it counts repetitions and is no property
    of a point.
    """
    return {key: value_of(result, key) for key in varying if key != "sample"}


def value_of(result: Result, key: str) -> str:
    """Return the value of the dotted config `key`; an empty string where neither config nor overrides know it."""
    node: Any = result.config
    for part in key.split("."):
        node = node.get(part, _MISSING) if isinstance(node, dict) else _MISSING
    if isinstance(node, dict):
        for field in _NAMING_FIELDS:
            if isinstance(node.get(field), str):
                return str(node[field])
        return _from_overrides(result, key) or as_text(node)
    return _from_overrides(result, key) if node is _MISSING else as_text(node)


def as_text(value: Any) -> str:
    """Return a config value as it would be typed: ``null``, ``true``, numbers and words bare, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _from_overrides(result: Result, key: str) -> str:
    found = ""
    for override in result.identity.overrides:
        name, equals, value = override.lstrip("+~").partition("=")
        if equals and name.split("@")[0] == key:
            found = value
    return found


_MISSING = object()
