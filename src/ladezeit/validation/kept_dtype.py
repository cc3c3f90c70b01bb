"""Which weights a model class keeps in float32 whatever dtype is asked for."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def kept_float32(model: Any, dtype: str) -> Callable[[str], bool]:
    """Return whether transformers loads the tensor of a name as float32 when `dtype` is asked for.

    Model classes list patterns: ``_keep_in_fp32_modules`` for float16, ``_keep_in_fp32_modules_strict`` for bfloat16
    too (transformers, ``PreTrainedModel._get_dtype_plan``).
    """
    patterns: set[str] = set()
    if dtype == "float16":
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype in ("float16", "bfloat16"):
        patterns |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if not patterns:
        return lambda name: False
    # transformers reads `*` as anything, and the rest as a regular expression found anywhere in the name.
    found = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns)))
    return lambda name: found.search(name) is not None


@dataclass(frozen=True)
class WrongDtype:
    """A weight whose dtype is `found` and should be `wanted`; torch dtype names."""

    name: str
    found: str
    wanted: str


def without_class_choices(model: Any, dtype: str, wrong: list[WrongDtype]) -> list[WrongDtype]:
    """Drop from `wrong` what the model class itself makes in another dtype than the `dtype` asked for.

    Some classes do so without listing it. That shows only in a model made anew: it is built on meta, and only where
    something is wrong at all. What a class lists for float32 and is not float32 stays wrong.
    """
    if all(weight.wanted != dtype for weight in wrong):
        return wrong
    own = _class_dtypes(model, dtype)
    return [weight for weight in wrong if weight.wanted != dtype or own.get(weight.name) != weight.found]


def _class_dtypes(model: Any, dtype: str) -> dict[str, str]:
    import torch

    try:
        with torch.device("meta"):
            fresh = type(model)._from_config(copy.deepcopy(model.config), dtype=getattr(torch, dtype))
    except Exception:  # the class cannot be made on meta: then nothing is excused
        return {}
    tensors = [*fresh.named_parameters(), *fresh.named_buffers()]
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors}
