"""Whether what was to be quantised is, by the scheme that was asked for, and nothing else."""

from typing import Any

from ladezeit.loading.quantisation import CHECKPOINTS_OWN, dequantised_dtype, rule, scheme_of
from ladezeit.validation.proof import Expected, Finding


def spoken_claim(expected: Expected) -> str | None:
    """Return what it proves that a quantised model says what its reference says; None for one that is not quantised."""
    if expected.quantisation is None:
        return None
    return "it says what another load by the same quantiser says, which is not to say what the original would"


class Quantised:
    """Judges the weights of a model one by one; `count` is how many were found quantised as asked."""

    def __init__(self, model: Any, expected: Expected) -> None:
        self._asked = expected.quantisation
        self._dtype = expected.dtype
        self._takes = rule(model)
        self._of_scheme = 0
        self.count = 0

    def findings(self, path: str, module: Any, name: str, tensor: Any) -> list[Finding]:
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
            return [Finding("quantisation", full, f"is {found}, and the quantiser's own rule leaves it out")]
        dtype = dequantised_dtype(tensor)
        if dtype not in (None, self._dtype):
            return [Finding("dtype", full, f"dequantises to {dtype}, asked for {self._dtype}")]
        self.count += 1
        return []

    def claim(self) -> str | None:
        """Return what looking at weights one by one proves of the quantised ones; None where none was asked for."""
        if not self.count:
            return None
        return f"{self.count} weights are quantised as asked ({self._asked}); their values were not compared"

    def missing(self) -> list[Finding]:
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
