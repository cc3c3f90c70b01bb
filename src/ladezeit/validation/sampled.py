"""The level `sampled`: meta tensors, looked for in the first and last modules only, as the origin case's cure did."""

from ladezeit.config import ValidationConfig
from ladezeit.loading.base import EngineModel
from ladezeit.validation.all_modules import META
from ladezeit.validation.faults import Fault
from ladezeit.validation.proof import Expected, Finding, Look

#: A sample finds what happens to lie in it: nothing that can be promised.
CLAIMS: frozenset[Fault] = frozenset()


def look(loaded: EngineModel, expected: Expected, config: ValidationConfig) -> Look:
    """Look at the tensors that the first and last `config.k` modules hold themselves; what lies between is not seen."""
    modules = list(loaded.model.named_modules())
    sample = modules if len(modules) <= 2 * config.k else modules[: config.k] + modules[-config.k :]
    tensors_seen = 0
    findings = []
    for path, module in sample:
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            tensors_seen += 1
            if tensor.is_meta:
                findings.append(Finding("meta", f"{path}.{name}" if path else name, META))
    return Look(
        claim=f"no tensor held by {len(sample)} of {len(modules)} modules is on meta; the others were not looked at",
        modules_seen=len(sample),
        tensors_seen=tensors_seen,
        findings=findings,
    )
