"""Choosing samples by what their config says: ``loading=transformers``, ``model.name=tiny``, ``status=ok``."""

from collections.abc import Iterable, Sequence

from ladezeit.errors import LadezeitError, did_you_mean
from ladezeit.result import Result
from ladezeit.results.varying import value_of

Condition = tuple[str, str]

#: Keys that are no config keys but can be asked for all the same.
_OWN_KEYS = ("status", "sweep", "sample", "point", "label")


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


def matches(result: Result, conditions: Sequence[Condition]) -> bool:
    """Say whether the sample meets all conditions."""
    return all(property_of(result, key) == value for key, value in conditions)


def property_of(result: Result, key: str) -> str:
    """Return the value of a config key, or of ``status``, ``sweep``, ``sample``, ``point``, ``label``."""
    known = result.identity
    own = {"status": result.status.value, "sweep": known.sweep or "", "point": known.point, "label": known.label}
    if key in own:
        return own[key]
    return str(known.sample) if key == "sample" else value_of(result, key)


def select(results: Sequence[Result], conditions: Sequence[Condition]) -> list[Result]:
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
