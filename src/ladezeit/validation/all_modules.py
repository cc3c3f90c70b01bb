"""The level `all_modules`: meta tensors, looked for in every module and in all that is below it.

The origin case's manager did this after every load: each tensor is looked at once for every module above it, so the
cost grows with the depth of the tree, and with how slowly one look goes.
"""

from typing import Any

from ladezeit.config import ValidationConfig
from ladezeit.loading.base import EngineModel
from ladezeit.validation.faults import Fault
from ladezeit.validation.proof import Expected, Finding, Look

#: An offloaded weight is on meta between forwards, so it is found too, whether it was asked for or not.
CLAIMS = frozenset({Fault.buffer_on_meta, Fault.weight_on_meta, Fault.silent_offload})

META = "has no data: it is on the meta device"


def look(loaded: EngineModel, expected: Expected, config: ValidationConfig) -> Look:
    """Walk every module with its recursive parameters and buffers; finds meta tensors and nothing else."""
    modules_seen = tensors_seen = 0
    found: dict[str, None] = {}
    for path, module in loaded.model.named_modules():
        modules_seen += 1
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            tensors_seen += 1
            if tensor.is_meta:
                found[f"{path}.{name}" if path else name] = None
    return Look(
        claim=f"no parameter or buffer of {modules_seen} modules is on meta; nothing else was looked for",
        modules_seen=modules_seen,
        tensors_seen=tensors_seen,
        findings=[Finding("meta", name, META) for name in found],
    )


def meta_tensors(model: Any) -> list[str]:
    """Return the names of the tensors on meta, found the origin manager's way."""
    nothing = Expected("cpu", "float32", single_device=False, offload_allowed=True, device_strategy=False)
    return [finding.name for finding in look(EngineModel(model), nothing, ValidationConfig()).findings]
