"""Where each module's tensors may be: the resolved placement, held against what was asked for."""

from collections.abc import Iterator
from typing import Any

from ladezeit.loading.base import EngineModel
from ladezeit.validation.proof import Expected, Finding

_DISK = "disk"
_CPU = "cpu"


class Places:
    """The resolved device map of a load (module to device; accelerate's or none), and what of it was asked for."""

    def __init__(self, loaded: EngineModel, expected: Expected) -> None:
        resolved = loaded.device_map or getattr(loaded.model, "hf_device_map", None) or {"": expected.device}
        self._expected = expected
        self._map = {module: device_name(place) for module, place in resolved.items()}
        self._legitimate = {place for place in self._map.values() if self._is_legitimate(place)} - {_DISK}
        self._by_module: dict[str, str] = {}

    def refused(self) -> list[Finding]:
        """Return a finding for each part of the placement that was not asked for."""
        findings = []
        for module, place in self._map.items():
            if not self._is_legitimate(place):
                kind = "offload" if self._is_offload(place) else "device"
                findings.append(Finding(kind, module, f"was placed on {place}, which was not asked for"))
        return findings

    def allowed(self, module: str, offloaded: bool) -> set[str]:
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


def device_name(place: Any) -> str:
    """Return a place in a device map as torch spells a tensor's device (0, "0" and "cuda" are ``cuda:0``)."""
    text = str(place)
    if text.isdigit():
        return f"cuda:{text}"
    return "cuda:0" if text == "cuda" else text


def offloads(module: Any) -> bool:
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
        if not offloads(module):
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
