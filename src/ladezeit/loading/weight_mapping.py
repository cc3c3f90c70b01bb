"""How a model wants the tensors of a checkpoint: which of them it keeps as one, and in which dtype.

`transformers` asks that of every tensor by itself while it loads: it renames a key with regular expressions, copies a
converter for it and queues it, which takes seconds for a mixture of experts and its tens of thousands of tensors, and
merges and casts them one after the other. Here the same question is put to the library's own mapping once for each
*kind* of key before anything is read, so that an engine can put bytes where they belong, as what they are to be.

Only what is certain is arranged: stacked experts, stacked and concatenated ones, and casts between floating dtypes.
Everything else is left to `from_pretrained`, which gets the arranged tensors under the names that it would have made.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ladezeit.checkpoint.dtypes import torch_dtype
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.safetensors_header import TensorEntry
from ladezeit.config import DType
from ladezeit.loading.base import FusedParameter, LoadRequest, Slice, WeightMapping
from ladezeit.model.classes import build_on_meta, class_and_config

if TYPE_CHECKING:
    import torch


_NUMBER = re.compile(r"\d+")
_TWO_NUMBERS = re.compile(r"\.\d+\..*\.\d+\.")
_CASTABLE = ("F16", "BF16", "F32")
#: Of every kind of key this many are asked of the library one by one, to see that the kind behaves as one.
_CHECKED = 4


def plan_weight_mapping(request: LoadRequest) -> WeightMapping:
    """Return how the request's model wants its checkpoint's tensors; empty where it wants them as they are."""
    checkpoint, asked = request.checkpoint, _asked_dtype(request)
    floats = {entry.dtype for entry in checkpoint.tensors} & set(_CASTABLE)
    casts = asked is not None and any(torch_dtype(dtype) != asked for dtype in floats)
    if checkpoint.config.get("quantization_config") is not None or request.trust_remote_code:
        return WeightMapping()
    try:
        if not casts and not (_may_merge(checkpoint) and _has_converters(checkpoint)):
            return WeightMapping()
        return _plan_weight_mapping(request, asked)
    except (ImportError, AttributeError, TypeError) as cause:  # another release of the library: it does it itself
        return WeightMapping(reason=f"{type(cause).__name__}: {cause}")


def _asked_dtype(request: LoadRequest) -> "torch.dtype | None":
    import torch

    asked = request.loading.dtype
    found = getattr(torch, request.checkpoint.dtype if asked is DType.auto else asked.value, None)
    return found if isinstance(found, torch.dtype) else None


def _may_merge(checkpoint: Checkpoint) -> bool:
    """Whether any tensor has a number besides its layer's, as experts have: without one nothing can be stacked.

    The library's own answer is better and takes a twentieth of a second, before which nothing could be read.
    """
    return any(_TWO_NUMBERS.search(entry.name) for entry in checkpoint.tensors)


def _has_converters(checkpoint: Checkpoint) -> bool:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    own_class, config = class_and_config(checkpoint.folder)
    names = (own_class.__name__, config.model_type)
    found = [mapping for name in names if (mapping := get_checkpoint_conversion_mapping(name)) is not None]
    return any(isinstance(transform, WeightConverter) for transform in (found[0] if found else ()))


def _plan_weight_mapping(request: LoadRequest, requested: "torch.dtype | None") -> WeightMapping:
    skeleton = build_on_meta(*class_and_config(request.checkpoint.folder), requested)
    names = names_of(skeleton)
    wanted = names.wanted
    targets: dict[str, dict[str | None, list[TensorEntry]]] = defaultdict(lambda: defaultdict(list))
    for entry, (target, pattern) in zip(
        request.checkpoint.tensors, names.resolve_name(entry.name for entry in request.checkpoint.tensors), strict=True
    ):
        targets[target][pattern].append(entry)
    casts = _Casts(requested, skeleton, wanted)
    merged: list[FusedParameter] = []
    dtypes: dict[str, torch.dtype] = {}
    for target, by_pattern in targets.items():
        if target not in wanted:
            continue
        one = _merged(target, by_pattern, names.converters, tuple(wanted[target].shape))
        if one is not None:
            merged.append(one)
        if one is not None or list(by_pattern) == [None]:
            dtypes |= casts.find_casts(target, [entry for entries in by_pattern.values() for entry in entries])
    used = tuple(transform for transform in names.mapping if transform.was_used())
    return WeightMapping(tuple(merged), dtypes, used)


def names_of(skeleton: Any) -> "Names":
    """Return the names of a model on `meta`."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return Names(get_model_conversion_mapping(skeleton), skeleton.base_model_prefix, skeleton.state_dict())


class Names:
    """Asks the library's mapping for the model's name of a key, once for each kind of key.

    Keys that differ in numbers alone are of one kind. The library sees a few of them; where what it says of these is
    the same but for the numbers, the rest follow, and where it is not, it is asked for each.
    """

    def __init__(self, mapping: Sequence[Any], prefix: str, wanted: dict[str, Any]) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
        self.mapping, self.wanted = mapping, wanted
        self.converters = {pattern: one for one in converters for pattern in one.source_patterns}

        def ask(key: str) -> tuple[str, str | None]:
            target, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            if target not in wanted and key in wanted:
                target, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
            return target, pattern

        self._ask = ask

    def __contains__(self, name: str) -> bool:
        return name in self.wanted

    def resolve_name(self, keys: Iterable[str]) -> list[tuple[str, str | None]]:
        """Return the model's name and the converter's pattern (None where there is none) for each of `keys`."""
        keys = list(keys)
        kinds: dict[str, list[str]] = defaultdict(list)
        of_key = [_NUMBER.sub("#", key) for key in keys]
        for key, kind in zip(keys, of_key, strict=True):
            kinds[kind].append(key)
        rules = {kind: self._rule(members) for kind, members in kinds.items()}
        return [rules[kind](key) for key, kind in zip(keys, of_key, strict=True)]

    def _rule(self, keys: list[str]) -> Callable[[str], tuple[str, str | None]]:
        step = max(1, len(keys) // _CHECKED)
        checked = {*keys[::step], keys[-1]}
        answers = {key: self._ask(key) for key in checked}
        for key in sorted(checked, key=lambda key: -len(set(_NUMBER.findall(key)))):
            rule = _generalized(key, *answers[key])
            if rule is not None and all(rule(other) == answer for other, answer in answers.items()):
                return rule
        return self._ask


def _generalized(key: str, target: str, pattern: str | None) -> Callable[[str], tuple[str, str | None]] | None:
    """Return a rule that does to other keys of the kind what was done to `key`; None where its numbers are not telling.

    A number in `target` must be one number of `key` alone, so that it is known where it came from.
    """
    numbers = _NUMBER.findall(key)
    pieces = _NUMBER.split(target)
    sources = []
    for number in _NUMBER.findall(target):
        if numbers.count(number) != 1:
            return None
        sources.append(numbers.index(number))

    def rule(other: str) -> tuple[str, str | None]:
        found = _NUMBER.findall(other)
        text = pieces[0]
        for source, piece in zip(sources, pieces[1:], strict=True):
            text += found[source] + piece
        return text, pattern

    return rule


def _merged(
    target: str, by_pattern: dict[str | None, list[TensorEntry]], converters: dict[str, Any], shape: tuple[int, ...]
) -> FusedParameter | None:
    """Return `target` as pieces of a stack of matrices; None where it is anything else."""
    patterns = list(by_pattern)
    if None in patterns:
        return None
    converter = converters[str(patterns[0])]
    order = [pattern for pattern in converter.source_patterns if pattern in by_pattern]
    if not _stacks(converter) or len(converter.target_patterns) != 1 or set(order) != set(patterns):
        return None
    columns = [_in_order(by_pattern[pattern]) for pattern in order]
    entries = [entry for column in columns for entry in column]
    rows = [column[0].shape[0] for column in columns if column and len(column[0].shape) == 2]
    if (
        len(shape) != 3
        or len(rows) != len(columns)
        or len({entry.dtype for entry in entries}) != 1
        or any(len(column) != shape[0] for column in columns)
        or any(entry.shape != column[0].shape for column in columns for entry in column)
        or any(column[0].shape[1] != shape[2] for column in columns)
        or sum(rows) != shape[1]
    ):
        return None
    matrix = shape[1] * shape[2]
    parts, above = [], 0
    for column, height in zip(columns, rows, strict=True):
        parts += [Slice(entry, number * matrix + above * shape[2]) for number, entry in enumerate(column)]
        above += height
    names = tuple(tuple(entry.name for entry in column) for column in columns)
    return FusedParameter(target, shape, entries[0].dtype, tuple(parts), names)


def _stacks(converter: Any) -> bool:
    """Whether a converter stacks tensors into one, and at most concatenates such stacks row by row."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    operations = converter.operations
    if getattr(converter, "force_cpu", False) or not 1 <= len(operations) <= 2:
        return False
    if type(operations[0]) is not MergeModulelist or operations[0].dim != 0:
        return False
    if len(operations) == 1:
        return len(converter.source_patterns) == 1
    return type(operations[1]) is Concatenate and operations[1].dim == 1


def _in_order(entries: Sequence[TensorEntry]) -> list[TensorEntry]:
    """Return tensors in the library's order, by the numbers in their names; none where more than those differ."""
    split = [entry.name.split(".") for entry in entries]
    if len({tuple(part for part in parts if not part.isdigit()) for parts in split}) != 1:
        return []
    numbers = [tuple(int(part) for part in parts if part.isdigit()) for parts in split]
    return [entry for _, entry in sorted(zip(numbers, entries, strict=True), key=lambda pair: pair[0])]


class _Casts:
    """Knows which parameters become the dtype that was asked for, by the rules of `from_pretrained`."""

    def __init__(self, requested: "torch.dtype | None", skeleton: Any, wanted: dict[str, Any]) -> None:
        self._wanted = wanted
        # Classes that keep some modules in float32 whatever is asked have their own rules: the library applies them.
        self._asked = None if requested is None or skeleton._get_dtype_plan(requested) else requested

    def find_casts(self, target: str, entries: Sequence[TensorEntry]) -> "dict[str, torch.dtype]":
        """Return the dtype for each of `entries` that has another one than its parameter `target` is to have."""
        asked = self._asked
        if asked is None or self._wanted[target].dtype != asked:
            return {}
        size = math.prod(self._wanted[target].shape)
        if size != sum(math.prod(entry.shape) for entry in entries):
            return {}  # a checkpoint of another model: the library tells of it
        return {e.name: asked for e in entries if e.dtype in _CASTABLE and torch_dtype(e.dtype) != asked}
