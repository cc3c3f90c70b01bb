"""What a sample's config says: values by key, which keys vary, and which samples meet ``loading=transformers``."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ladezeit.errors import LadezeitError, did_you_mean
from ladezeit.results.records import Result, Status

#: Keys that are no config keys but can be asked for all the same.
_OWN_KEYS = ("status", "sweep", "sample", "point", "label")

#: The field of an option group that says which option was chosen, in the order they are looked for.
_NAMING_FIELDS = ("name", "state", "level", "kind")

_MISSING = object()

#: Keys that do not change what is measured (as `ladezeit.config.NOT_MEASURED`, without importing Hydra for it).
NOT_MEASURED = ("sample", "tracking", "order_seed", "discard_first", "ceilings", "outputs", "title", "smaller_model")

_FIRST = {"model": 0, "cache": 1, "loading": 2}

Condition = tuple[str, str]


def parse_conditions(texts: Iterable[str]) -> list[Condition]:
    """Return ``key=value`` texts as pairs; several may stand in one text, parted by blanks.

    Raises:
        LadezeitError: a text has no ``=``.
    """
    pairs = []
    for text in " ".join(texts).split():
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise LadezeitError(f"'{text}' is not a condition: write key=value, as loading=transformers")
        pairs.append((key, value))
    return pairs


def matches_conditions(result: Result, conditions: Sequence[Condition]) -> bool:
    """Say whether the sample meets all conditions."""
    return all(property_of(result, key) == value for key, value in conditions)


def property_of(result: Result, key: str) -> str:
    """Return the value of a config key, or of ``status``, ``sweep``, ``sample``, ``point``, ``label``."""
    known = result.identity
    own = {"status": result.status.value, "sweep": known.sweep or "", "point": known.point, "label": known.label}
    if key in own:
        return own[key]
    return str(known.sample) if key == "sample" else value_of(result, key)


def select_samples(results: Sequence[Result], conditions: Sequence[Condition]) -> list[Result]:
    """Return the samples that meet all conditions.

    Raises:
        LadezeitError: none does; the text names the values that there are.
    """
    left = list(results)
    for key, value in conditions:
        kept = [result for result in left if property_of(result, key) == value]
        if not kept:
            raise LadezeitError(_nothing_left(left, key, value))
        left = kept
    return left


def _nothing_left(results: Sequence[Result], key: str, value: str) -> str:
    found = sorted({property_of(result, key) for result in results} - {""})
    if found:
        near = did_you_mean(value, found)
        return f"no sample has {key}={value}: there is {', '.join(found[:12])}{', …' if len(found) > 12 else ''}.{near}"
    known = sorted({name for result in results for name in result.config} | set(_OWN_KEYS))
    return f"'{key}' is not in these samples' configs: keys are {', '.join(known)}.{did_you_mean(key, known)}"


# What a sweep varied, read back from a result: config keys and the value each has in a sample.


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


def fingerprint_of(result: Result) -> str | None:
    """Return the fingerprint of the checkpoint that was loaded; None in results that do not have it."""
    found = (result.environment.get("checkpoint") or {}).get("fingerprint")
    return None if found is None else str(found)


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


# Which config keys tell points apart, found in the results themselves: for results that come from several sweeps.


def infer_varying_keys(results: Sequence[Result], declared: Sequence[str] = ()) -> list[str]:
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


# The command that measures a whole point again.


def point_command(result: Result, samples: int) -> str:
    """Return the command that measures the point of `result` again, `samples` times, as a sweep."""
    own = [word for word in result.identity.overrides if word.lstrip("+~").partition("=")[0] != "sample"]
    words = [word for word in own if not word.startswith("hydra.")]
    program, flags = _sources(shlex.split(result.identity.command))
    return shlex.join([*program, "-m", *flags, *words, f"sample=range({samples})"])


def _sources(command: list[str]) -> tuple[list[str], list[str]]:
    """Return what a sample's command says of where code and options come from: before the program's name, and after."""
    begin = command.index("ladezeit") if "ladezeit" in command else 0
    program = command[:begin] if command[:1] == ["env"] else []
    flags: list[str] = []
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word in ("--config-dir", "--config-name"):
            flags += [word, following]
        elif word.startswith("hydra.searchpath="):
            flags.append(word)
    return [*program, "ladezeit"], flags


def metric_of(results: Iterable[Result], name: str) -> list[float]:
    """Return the metric `name` of those results that are `ok` and have it."""
    return [r.metrics[name] for r in results if r.status is Status.ok and name in r.metrics]


def failure_reason(result: Result) -> str:
    """Return in one line why a sample is not `ok`."""
    text = result.reason or (f"{result.error.type}: {result.error.message}" if result.error else "no reason given")
    return " ".join(text.split())
