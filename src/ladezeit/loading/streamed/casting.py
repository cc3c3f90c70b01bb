"""Elements of one dtype put into memory of another, on the host, in one thread at a time."""

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Between these two torch casts element by element (2.0 to 4.3 GB/s in one thread); to float32 and from it by vectors,
#: so that both steps make 7 to 10 of it. What is a number becomes the same one either way.
_HALVES = {torch.float16, torch.bfloat16}

#: So many elements are float32 at a time: few enough to stay in a processor's caches, enough that calls do not count.
#: Bringing 3 GB took 0.70 s (quartiles 0.67, 0.89), with half or twice as many 0.83, and without the step 0.86 (0.72,
#: 0.93; n = 24 in turn, two processors).
_BLOCK = 2**20


class Casting:
    """Copies and casts, for one thread: it keeps the memory that a cast by two steps needs."""

    def __init__(self) -> None:
        self._floats: Tensor | None = None

    def put(self, target: "Tensor", elements: "Tensor") -> None:
        """Write flat `elements` into `target`, bit for bit as ``target.copy_(elements)`` would."""
        if target.dtype == elements.dtype or not {target.dtype, elements.dtype} <= _HALVES:
            target.copy_(elements)
            return
        if self._floats is None:
            self._floats = torch.empty(_BLOCK, dtype=torch.float32, device="cpu")
        for begin in range(0, elements.numel(), _BLOCK):
            block = elements[begin : begin + _BLOCK]
            floats = self._floats[: block.numel()]
            floats.copy_(block)
            # Only what is NaN comes out otherwise by the other way; the maximum is NaN where any element is.
            all_numbers = not math.isnan(floats.numpy().max())
            target[begin : begin + _BLOCK].copy_(floats if all_numbers else block)

    def close(self) -> None:
        """Let go of the memory."""
        self._floats = None
