"""Checks of a model that are not about one tensor's place or bytes: quantization, generation config, float32, ties."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.files import read_settings
from ladezeit.loading.quantization import CHECKPOINTS_OWN, dequantized_dtype, quantizer_rule, scheme_of
from ladezeit.model.classes import build_on_meta
from ladezeit.model.tensors import component_tensors
from ladezeit.validation.expected import Expected
from ladezeit.validation.verification import Finding

#: Keys of the file that say who wrote it, not how to generate.
_ABOUT_THE_FILE = ("transformers_version", "_from_model_config")


def logits_claim(expected: Expected) -> str | None:
    """Return what it shows that a quantized model says what its reference says; None for one that is not quantized."""
    if expected.quantization is None:
        return None
    return "it generates what another load by the same quantizer generates, which need not be what the original would"


class QuantizationCheck:
    """Judges the weights of a model one by one; `count` is how many were found quantized as asked."""

    def __init__(self, model: Any, expected: Expected) -> None:
        self._asked = expected.quantization
        self._dtype = expected.dtype
        self._takes = quantizer_rule(model)
        self._of_scheme = 0
        self.count = 0

    def find_faults(self, path: str, module: Any, name: str, tensor: Any) -> list[Finding]:
        """Return what is wrong with the parameter `name` of `module`, which hangs at `path`; counts it otherwise."""
        full = f"{path}.{name}" if path else name
        found = scheme_of(tensor)
        if self._asked == CHECKPOINTS_OWN:
            self.count += found is not None
            return []
        if found is None:
            return self._plain(full, module, tensor, name == "weight" and self._takes(path, module))
        if found != self._asked:
            asked = f"asked for {self._asked}" if self._asked else "which was not asked"
            return [Finding("quantisation", full, f"is {found}, {asked}")]
        self._of_scheme += 1
        if not (name == "weight" and self._takes(path, module)):
            return [Finding("quantisation", full, f"is {found}, and the quantizer's own rule leaves it out")]
        dtype = dequantized_dtype(tensor)
        if dtype not in (None, self._dtype):
            return [Finding("dtype", full, f"dequantizes to {dtype}, asked for {self._dtype}")]
        self.count += 1
        return []

    def describe_claim(self) -> str | None:
        """Return what looking at weights one by one shows of the quantized ones; None where none was asked for."""
        if not self.count:
            return None
        return f"{self.count} weights are quantized as asked ({self._asked}); their values were not compared"

    def find_missing(self) -> list[Finding]:
        """Return a finding where a scheme was asked for and not one tensor follows it."""
        if self._asked in (None, CHECKPOINTS_OWN) or self._of_scheme:
            return []
        return [Finding("quantisation", "", f"no tensor is {self._asked}, which was asked")]

    def _plain(self, full: str, module: Any, tensor: Any, taken: bool) -> list[Finding]:
        from torch.nn import Linear

        kind = str(tensor.dtype).removeprefix("torch.")
        if self._asked and taken:
            return [Finding("quantisation", full, f"is plain {kind}, asked for {self._asked}")]
        if isinstance(module, Linear) and not (tensor.is_floating_point() or tensor.is_complex()):
            return [Finding("quantisation", full, f"is {kind} without scales, which was not asked")]
        return []


# Whether weights that the model ties are one tensor in memory, and not two that happen to be equal.


def find_untied_weights(model: Any, expected: Expected) -> list[Finding]:
    """Return a finding for each pair of weights that the model or its config ties, and that is not one storage.

    A pair that the placement put on two devices is let pass where several devices are legitimate: a copy is the only
    way to have it on both. Weights on meta are not judged here.
    """
    findings = []
    for target, source in _pairs(model).items():
        one, other = _tensor(model, target), _tensor(model, source)
        if one is None or other is None or one.is_meta or other.is_meta or _same(one, other):
            continue
        if one.device != other.device and not expected.single_device:
            continue
        findings.append(
            Finding(
                "tie",
                target,
                f"is a tensor of its own, and the model ties it to {source}; where the checkpoint holds two different "
                f"ones, its config.json must say tie_word_embeddings=false",
            )
        )
    return findings


def _pairs(model: Any) -> dict[str, str]:
    """Return what is tied to what: transformers' own list, and the output embedding where config and class tie it.

    transformers takes a pair off its list, with a log line, where the checkpoint holds different values for the two.
    """
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if getattr(model.config, "tie_word_embeddings", False) and getattr(model, "_tied_weights_keys", None):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        names = {id(module): name for name, module in model.named_modules() if module in (head, embedding)}
        if id(head) in names and id(embedding) in names:
            pairs.setdefault(f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight")
    return pairs


def _tensor(model: Any, name: str) -> Any:
    path, _, attribute = name.rpartition(".")
    try:
        return getattr(model.get_submodule(path), attribute, None)
    except AttributeError:
        return None


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    pairs = zip(
        component_tensors(one), component_tensors(other), strict=False
    )  # of two that are not one, the first parts differ already
    return bool(one.shape == other.shape and all(_same_memory(part, twin) for part, twin in pairs))


def _same_memory(one: Any, other: Any) -> bool:
    return bool(one.device == other.device and one.data_ptr() == other.data_ptr())


# Whether a model is what `from_pretrained` makes of its checkpoint: its class, and the adapter that lies beside it.


def find_other_class(model: Any, expected: Expected) -> list[Finding]:
    """Return a finding where `model` is of another class than expected, and one where it lacks the adapter.

    Code of a checkpoint is imported anew by each load, so classes are compared by their names.
    """
    inner = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    adapted = getattr(inner, "_hf_peft_config_loaded", False) or hasattr(inner, "peft_config")
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    findings = []
    wanted = expected.model_class
    if wanted is not None and _class_name(wanted) not in map(_class_name, type(inner).__mro__):
        detail = f"the model is {_class_name(type(inner))}, and from_pretrained makes {_class_name(wanted)}"
        findings.append(Finding("class", "", detail))
    if expected.adapter and not adapted:
        findings.append(Finding("adapter", "", "the adapter beside the weights was not added, as from_pretrained does"))
    return findings


def _class_name(one: type) -> str:
    return f"{one.__module__}.{one.__qualname__}"


# Which weights a model class keeps in float32 whatever dtype is asked for.


def fp32_exceptions(model: Any, dtype: str) -> Callable[[str], bool]:
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
        fresh = build_on_meta(type(model), copy.deepcopy(model.config), getattr(torch, dtype))
    except Exception:  # the class cannot be made on meta: then nothing is excused
        return {}
    tensors = [*fresh.named_parameters(), *fresh.named_buffers()]
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors}


# Whether a model speaks as its checkpoint says: stops where it should, with the settings it was published with.


def stored_generation_config(folder: Path) -> dict[str, Any] | None:
    """Return the content of the checkpoint's generation_config.json, None where there is none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return read_settings(folder, "generation_config.json")


def not_taken_up(model: Any, stored: dict[str, Any] | None) -> list[Finding]:
    """Return a finding where a model that can generate has no generation config, or another one than `stored`.

    Compared are plain values under names that this transformers knows; nested ones become objects of its own.
    """
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return []
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return [Finding("generation_config", "", "the model can generate and has no generation config")]
    differing = [
        f"{key} is {getattr(settings, key)!r}, the checkpoint has {value!r}"
        for key, value in (stored or {}).items()
        if key not in _ABOUT_THE_FILE
        and not isinstance(value, dict)
        and hasattr(settings, key)
        and getattr(settings, key) != value
        and repr(getattr(settings, key)) != repr(value)  # NaN is not equal to itself
    ]
    if not differing:
        return []
    return [Finding("generation_config", "", "; ".join(differing))]
