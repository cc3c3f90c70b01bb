"""The level `placement`: every parameter and buffer once, for all that shows without reading the checkpoint again.

Cheap enough (milliseconds) that nobody has to sample. What it does not see are the values: a tensor of the right
device, dtype and name may hold anything.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ladezeit.config import ValidationConfig
from ladezeit.loading.base import EngineModel
from ladezeit.loading.parts import parts
from ladezeit.loading.quantisation import scheme_of
from ladezeit.validation.all_modules import META
from ladezeit.validation.faults import Fault
from ladezeit.validation.generation import not_taken_up
from ladezeit.validation.kept_dtype import WrongDtype, kept_float32, without_class_choices
from ladezeit.validation.places import Places, offloads
from ladezeit.validation.proof import Expected, Finding, Look
from ladezeit.validation.quantised import Quantised
from ladezeit.validation.ties import untied

#: All that shows without reading values; of the files, what the keys that the load could not match tell.
CLAIMS = frozenset(
    {
        Fault.missing_in_file,
        Fault.extra_in_file,
        Fault.wrong_shape_in_file,
        Fault.wrong_dtype,
        Fault.buffer_on_meta,
        Fault.weight_on_meta,
        Fault.untied_head,
        Fault.silent_offload,
    }
)


@dataclass(frozen=True)
class _Held:
    """A tensor, where it hangs, and whether the checkpoint's dtype and the offloading of its module concern it."""

    name: str
    module: str
    tensor: Any
    stored: bool
    offloaded: bool
    is_parameter: bool


@dataclass(frozen=True)
class _Counts:
    """How much was seen, and how much of that is quantised or offloaded."""

    tensors: int
    modules: int
    quantised: int
    offloaded: int


def look(loaded: EngineModel, expected: Expected, config: ValidationConfig) -> Look:
    """Check meta, device, dtype, ties, offload, generation config and the keys that the load could not match."""
    model = loaded.model
    places = Places(loaded, expected)
    kept = kept_float32(model, expected.dtype)
    quantised = Quantised(model, expected)
    findings = places.refused()
    wrong_dtypes: list[WrongDtype] = []
    modules_seen = tensors_seen = offloaded = 0
    seen: set[int] = set()
    for path, module in model.named_modules():
        modules_seen += 1
        for held in _tensors(path, module):
            if id(held.tensor) in seen:
                continue
            seen.add(id(held.tensor))
            tensors_seen += 1
            offloaded += held.tensor.is_meta and held.offloaded
            findings += _place_findings(held, places, expected)
            if held.is_parameter:
                findings += quantised.findings(path, module, held.name.rpartition(".")[2], held.tensor)
            if held.stored and held.tensor.is_floating_point() and scheme_of(held.tensor) is None:
                wanted = "float32" if kept(held.name) else expected.dtype
                found = str(held.tensor.dtype).removeprefix("torch.")
                if found != wanted:
                    wrong_dtypes.append(WrongDtype(held.name, found, wanted))
    findings += _dtypes(without_class_choices(model, expected.dtype, wrong_dtypes))
    findings += quantised.missing()
    findings += untied(model, expected)
    findings += not_taken_up(model, expected.generation_config)
    findings += _keys(loaded)
    return Look(
        claim=_claim(_Counts(tensors_seen, modules_seen, quantised.count, offloaded), expected),
        modules_seen=modules_seen,
        tensors_seen=tensors_seen,
        findings=findings,
        meaning=quantised.claim(),
    )


def _tensors(path: str, module: Any) -> Iterator[_Held]:
    # The dictionaries themselves, because the named_ iterators build every prefix again and hide which buffers persist.
    offloaded = offloads(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield _Held(f"{path}.{name}" if path else name, path, parameter, True, offloaded, True)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            stored = name not in module._non_persistent_buffers_set
            yield _Held(f"{path}.{name}" if path else name, path, buffer, stored, offloaded, False)


def _place_findings(held: _Held, places: Places, expected: Expected) -> list[Finding]:
    if held.tensor.is_meta:
        if not held.offloaded:
            return [Finding("meta", held.name, META)]
        if expected.offload_allowed:
            return []
        return [
            Finding("offload", held.name, "is kept elsewhere and brought in for every forward, which was not asked")
        ]
    allowed = places.allowed(held.module, held.offloaded)
    strays = {str(part.device) for part in parts(held.tensor)} - allowed
    if not strays:
        return []
    if "meta" in strays:
        return [Finding("meta", held.name, META)]
    found = " and ".join(sorted(strays))
    return [Finding("device", held.name, f"is on {found}, asked for {' or '.join(sorted(allowed))}")]


def _dtypes(wrong: list[WrongDtype]) -> list[Finding]:
    return [Finding("dtype", weight.name, f"is {weight.found}, asked for {weight.wanted}") for weight in wrong]


def _keys(loaded: EngineModel) -> list[Finding]:
    return [
        *(
            Finding("missing_key", key, "is not in the checkpoint: its values are made up")
            for key in loaded.missing_keys
        ),
        *(Finding("mismatched_key", key, "has another shape in the checkpoint") for key in loaded.mismatched_keys),
        *(
            Finding("unexpected_key", key, "is in the checkpoint only, and was dropped")
            for key in loaded.unexpected_keys
        ),
    ]


def _claim(seen: _Counts, expected: Expected) -> str:
    where = f"on {expected.device}" if expected.single_device else "where its placement says"
    library = f"{seen.quantised} tensors quantised as asked: their values are the library's; the others "
    offload = f"{seen.offloaded} offloaded as allowed" if seen.offloaded else "nothing offloaded"
    return (
        f"each of {seen.tensors} tensors in {seen.modules} modules has data {where}, "
        f"{library if seen.quantised else ''}{expected.dtype} as asked; ties tied, {offload}, every key "
        f"matched, generation config there; values were not compared"
    )
