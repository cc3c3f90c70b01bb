"""Names of runs: what differs comes first, in at most as many characters as MLflow's lists show.

``cold·streamed·#2`` is sample 2 of the point with cache state `cold` and loading method `streamed`. Values that do not
fit are shortened from the left, word by word: ``device_map_auto_max_memory`` becomes ``dmam_memory`` if it must.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence

#: MLflow's run lists and charts cut names at about this many characters.
LIMIT = 20

_SEPARATOR = "·"
_LEAST_LIMIT = 12
_WORD_BORDERS = re.compile(r"[_\-./:\s]+")


def make_label(varying_values: Mapping[str, str], sample: int, limit: int = LIMIT) -> str:
    """Return a name such as ``cold·streamed·#2``.

    Args:
        varying_values: config key (``cache``, ``loading``, ``loading.dtype``, …) to its value in this point; the cache
            state comes first, then the loading method, then the rest as given. A key ``sample`` is left out.
        sample: which repetition of the point it is; never shortened.
        limit: most characters of the name, at least 12.
    """
    return _compose(_ordered(varying_values), f"#{sample}", limit)


def make_labels(points: Sequence[tuple[Mapping[str, str], int]], limit: int = LIMIT) -> list[str]:
    """Return one label for each (varying values, sample), in the order given and all different.

    Where shortening makes two points look alike, both get a few characters of a digest of their values
    (``cold·dma~3f·#0``).
    """
    names = [make_label(values, sample, limit) for values, sample in points]
    for digits in range(2, _LEAST_LIMIT):
        alike = {name for name, count in Counter(names).items() if count > 1}
        if not alike:
            break
        for index, (values, sample) in enumerate(points):
            if names[index] in alike:
                names[index] = _with_digest(values, sample, limit, digits, salt=index if digits > 3 else None)
    return names


def _ordered(varying_values: Mapping[str, str]) -> list[str]:
    def rank(key: str) -> int:
        if key == "cache" or key.startswith("cache."):
            return 0
        return 1 if key == "loading" else 2

    keys = sorted((key for key in varying_values if key != "sample"), key=rank)
    return [text for text in (_one_line(varying_values[key]) for key in keys) if text]


def _one_line(value: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in value)
    return "_".join(printable.strip("'\" ").split())


def _compose(values: list[str], suffix: str, limit: int) -> str:
    limit = max(limit, _LEAST_LIMIT)
    if len(suffix) > limit:
        return suffix[:limit]
    # Each value that is shown costs a separator and one character at least.
    shown = values[: max(0, (limit - len(suffix)) // 2)]
    room = limit - len(suffix) - len(shown) * len(_SEPARATOR)
    return _SEPARATOR.join([*_fit(shown, room), suffix])


def _fit(values: list[str], room: int) -> list[str]:
    """Shorten the longest value by one step until all fit into `room` characters."""
    steps = [_shorter_forms(value) for value in values]
    while sum(len(forms[0]) for forms in steps) > room:
        # The later of two equally long values gives way: what differs first stays readable.
        longest = max(range(len(steps)), key=lambda index: (len(steps[index][0]), index))
        steps[longest].pop(0)
    return [forms[0] for forms in steps]


def _shorter_forms(value: str) -> list[str]:
    """Return `value` and ever shorter forms of it, down to one character."""
    words = [word for word in _WORD_BORDERS.split(value) if word] or [value]
    forms = [value]
    for count in range(1, len(words)):
        initials = "".join(word[0] for word in words[:count])
        forms.append("_".join([initials, *words[count:]]))
    last = forms[-1]
    forms += [last[:length] for length in range(len(last) - 1, 0, -1)]
    return forms


def _with_digest(values: Mapping[str, str], sample: int, limit: int, digits: int, salt: int | None) -> str:
    """Return the label with a digest before the sample; `salt` tells even equal points apart."""
    text = repr(sorted((key, value) for key, value in values.items() if key != "sample")) + f"{salt}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:digits]
    return _compose(_ordered(values), f"~{digest}{_SEPARATOR}#{sample}", limit).replace(f"{_SEPARATOR}~", "~")
