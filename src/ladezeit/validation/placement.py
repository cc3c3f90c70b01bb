"""The level `placement`: every parameter and buffer once, for all that shows without reading the checkpoint again.

Cheap enough (milliseconds) that nobody has to sample. What it does not see are the values: a tensor of the right
device, dtype and name may hold anything.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ladezeit.config import ValidationConfig
from ladezeit.loading.base import EngineModel
from ladezeit.loading.quantization import scheme_of
from ladezeit.model.tensors import component_tensors
from ladezeit.validation.expected import Expected
from ladezeit.validation.faults import Fault
from ladezeit.validation.model_checks import (
    QuantizationCheck,
    WrongDtype,
    find_other_class,
    find_untied_weights,
    fp32_exceptions,
    not_taken_up,
    without_class_choices,
)
from ladezeit.validation.verification import META, Finding, LevelReport

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

_DISK = "disk"
_CPU = "cpu"


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
    """How much was seen, and how much of that is quantized or offloaded."""

    tensors: int
    modules: int
    quantized: int
    offloaded: int


def check_placement(loaded: EngineModel, expected: Expected, config: ValidationConfig) -> LevelReport:
    """Check meta, device, dtype, ties, offload, generation config and the keys that the load could not match."""
    model = loaded.model
    places = ResolvedDeviceMap(loaded, expected)
    kept = fp32_exceptions(model, expected.dtype)
    quantized = QuantizationCheck(model, expected)
    findings = places.find_refused()
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
                findings += quantized.find_faults(path, module, held.name.rpartition(".")[2], held.tensor)
            if held.stored and held.tensor.is_floating_point() and scheme_of(held.tensor) is None:
                wanted = "float32" if kept(held.name) else expected.dtype
                found = str(held.tensor.dtype).removeprefix("torch.")
                if found != wanted:
                    wrong_dtypes.append(WrongDtype(held.name, found, wanted))
    findings += _dtypes(without_class_choices(model, expected.dtype, wrong_dtypes))
    findings += quantized.find_missing()
    findings += find_untied_weights(model, expected)
    findings += not_taken_up(model, expected.generation_config)
    findings += _keys(loaded) + find_other_class(model, expected)
    return LevelReport(
        summary=_claim(_Counts(tensors_seen, modules_seen, quantized.count, offloaded), expected),
        modules_seen=modules_seen,
        tensors_seen=tensors_seen,
        findings=findings,
        guarantee=quantized.describe_claim(),
    )


def _tensors(path: str, module: Any) -> Iterator[_Held]:
    # The dictionaries themselves, because the named_ iterators build every prefix again and hide which buffers persist.
    offloaded = is_offloaded(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield _Held(f"{path}.{name}" if path else name, path, parameter, True, offloaded, True)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            stored = name not in module._non_persistent_buffers_set
            yield _Held(f"{path}.{name}" if path else name, path, buffer, stored, offloaded, False)


# Where each module's tensors may be: the resolved placement, held against what was asked for.


class ResolvedDeviceMap:
    """The resolved device map of a load (module to device; accelerate's or none), and what of it was asked for."""

    def __init__(self, loaded: EngineModel, expected: Expected) -> None:
        resolved = loaded.device_map or getattr(loaded.model, "hf_device_map", None) or {"": expected.device}
        self._expected = expected
        self._map = {module: device_name(place) for module, place in resolved.items()}
        self._legitimate = {place for place in self._map.values() if self._is_legitimate(place)} - {_DISK}
        self._by_module: dict[str, str] = {}

    def find_refused(self) -> list[Finding]:
        """Return a finding for each part of the placement that was not asked for."""
        findings = []
        for module, place in self._map.items():
            if not self._is_legitimate(place):
                kind = "offload" if self._is_offload(place) else "device"
                findings.append(Finding(kind, module, f"was placed on {place}, which was not asked for"))
        return findings

    def allowed_devices(self, module: str, offloaded: bool) -> set[str]:
        """Return the device names on which tensors of `module` may be.

        What stays behind of an offloaded module (its buffers) is where the module computes, which is any device.
        """
        if offloaded and self._expected.offload_allowed:
            return self._legitimate | {self._expected.device, _CPU}
        place = self._place(module)
        return {place if self._is_legitimate(place) else self._expected.device}

    def _place(self, module: str) -> str:
        """Return the place of `module`, which is its own entry's or the nearest parent's; parents are asked first."""
        if module not in self._by_module:
            own = self._map.get(module)
            if own is None:
                own = self._place(module.rpartition(".")[0]) if module else self._expected.device
            self._by_module[module] = own
        return self._by_module[module]

    def _is_legitimate(self, place: str) -> bool:
        if place == self._expected.device:
            return True
        if self._is_offload(place):
            return self._expected.offload_allowed
        return not self._expected.single_device

    def _is_offload(self, place: str) -> bool:
        return place == _DISK or (place == _CPU and self._expected.device != _CPU)


def _place_findings(held: _Held, places: ResolvedDeviceMap, expected: Expected) -> list[Finding]:
    if held.tensor.is_meta:
        if not held.offloaded:
            return [Finding("meta", held.name, META)]
        if expected.offload_allowed:
            return []
        return [
            Finding("offload", held.name, "is kept elsewhere and brought in for every forward, which was not asked")
        ]
    allowed = places.allowed_devices(held.module, held.offloaded)
    strays = {str(part.device) for part in component_tensors(held.tensor)} - allowed
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
            Finding("missing_key", key, "is not in the checkpoint: its values are random")
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
    library = f"{seen.quantized} tensors quantized as asked: their values are the library's; the others "
    offload = f"{seen.offloaded} offloaded as allowed" if seen.offloaded else "nothing offloaded"
    return (
        f"each of {seen.tensors} tensors in {seen.modules} modules has data {where}, "
        f"{library if seen.quantized else ''}{expected.dtype} as asked; ties tied, {offload}, every key "
        f"matched, generation config there; values were not compared"
    )


def device_name(place: Any) -> str:
    """Return a place in a device map as torch spells a tensor's device (0, "0" and "cuda" are ``cuda:0``)."""
    text = str(place)
    if text.isdigit():
        return f"cuda:{text}"
    return "cuda:0" if text == "cuda" else text


def is_offloaded(module: Any) -> bool:
    """Say whether accelerate keeps the weights of `module` elsewhere between forwards."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return False
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))


def offloaded_bytes(loaded: EngineModel) -> dict[str, int]:
    """Return the bytes of weights that accelerate keeps elsewhere between forwards, by place (``cpu``, ``disk``).

    A tied weight counts once. Empty where nothing is offloaded.
    """
    mapped = loaded.device_map or {}
    tied = set(getattr(loaded.model, "all_tied_weights_keys", None) or {})
    found: dict[str, int] = {}
    for path, module in loaded.model.named_modules():
        if not is_offloaded(module):
            continue
        above = next((part for part in _upwards(path) if part in mapped), "")
        place = mapped.get(above, _CPU)
        for name, tensor in module.named_parameters(prefix=path, recurse=False):
            if tensor.is_meta and name not in tied:
                found[place] = found.get(place, 0) + tensor.numel() * tensor.element_size()
    return found


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
