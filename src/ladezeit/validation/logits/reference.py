"""What transformers' own load says on the run's device, and how much two such loads differ.

    python -m ladezeit.validation.logits.reference <request.json> <output.json>

The second load calibrates: its weights lie elsewhere, as another engine's would, and what it says differently is the
device's own noise. Libraries choose their kernels by a weight's address too, and each rounds in its own way.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ladezeit.config import MatmulPrecision, RuntimeConfig
from ladezeit.errors import CheckpointError
from ladezeit.loading.quantisation import Scheme, quantization_config
from ladezeit.measure.limits import available_cpus
from ladezeit.validation import kept
from ladezeit.validation.apart import answer, run_apart
from ladezeit.validation.logits.spoken import NEW_TOKENS, PROMPT_TOKENS, Spoken
from ladezeit.validation.subject import Subject

#: In the cache folder.
FOLDER = "logits"
#: The noise of two loads is a sample of one: what is let pass is a multiple of it.
_TIMES_NOISE = 4.0
#: How far into memory of their own the second load's weights begin: the least that every engine here keeps to on a GPU.
_SHIFT_BYTES = 16


@dataclass(frozen=True)
class Reference:
    """What the reference said, the greatest difference of logits that is let pass, and how many tokens are sure.

    A token is sure where both loads said it, and no difference that is let pass could put another in its place.
    """

    spoken: Spoken
    tolerance: float
    noise: float
    sure_tokens: int

    def to_plain(self) -> dict[str, Any]:
        """Return plain data for `from_plain`."""
        plain = {"tolerance": self.tolerance, "noise": self.noise, "sure_tokens": self.sure_tokens}
        return {"spoken": self.spoken.to_plain(), **plain}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Reference":
        """Rebuild what `to_plain` returned."""
        return cls(**{**plain, "spoken": Spoken.from_plain(plain["spoken"])})


def reference_file(subject: Subject, runtime: RuntimeConfig, building: Callable[[], None] = lambda: None) -> Path:
    """Return the file of the reference for `subject` by these settings, made where there is none for its files.

    A quantised one is loaded by transformers with the same quantiser. `runtime` are settings that change what is
    computed: attention, threads, precision. `building` is called before a reference is made, which takes two loads.

    Raises:
        CheckpointError: the reference load failed.
    """
    settings = asdict(runtime)
    settings["matmul_precision"] = runtime.matmul_precision and runtime.matmul_precision.value
    place = {
        **subject.place(),
        "device": subject.device,
        "hardware": subject.hardware,
        "cpus": available_cpus(),
        "runtime": settings,
        "tokens": [PROMPT_TOKENS, NEW_TOKENS],
        "shift_bytes": _SHIFT_BYTES,
    }

    def build() -> dict[str, Any]:
        building()
        request = {**subject.request(), "runtime": settings}
        return run_apart("ladezeit.validation.logits.reference", request, f"model={subject.name}", runtime)

    return kept.ensure(subject.cache / FOLDER, subject.name, {"place": place, "files": subject.files()}, build)


def read(path: Path) -> Reference:
    """Read a reference file; raises `CheckpointError` where it is not there, or damaged."""
    try:
        return Reference.from_plain(kept.read(path))
    except (ValueError, TypeError, KeyError) as cause:
        raise CheckpointError(f"{path} is no reference: {cause!r}. Remove it, and it is made again") from cause


def make(request: dict[str, Any]) -> dict[str, Any]:
    """Make the reference in this process; returns plain data."""
    from ladezeit.sample import runtime

    settings = dict(request["runtime"])
    if settings["matmul_precision"] is not None:
        settings["matmul_precision"] = MatmulPrecision(settings["matmul_precision"])
    runtime.apply(RuntimeConfig(**settings), request["device"])
    one, other = _said(request), _said(request, _SHIFT_BYTES)
    noise = one.difference(other)
    passing = tolerance(one, noise, request["dtype"])
    return Reference(one, passing, noise, sure_tokens(one, other, passing)).to_plain()


def sure_tokens(one: Spoken, other: Spoken, passing: float) -> int:
    """Return how many of the first tokens every load has to say whose logits differ by no more than `passing`.

    Of two logits one may fall by that much and the other rise: a token that is ahead by no more than twice as much may
    lose its place.
    """
    leading = (number for number, lead in enumerate(one.leads) if not lead > 2 * passing)
    return min(one.agreed(other), next(leading, len(one.leads)))


def tolerance(spoken: Spoken, noise: float, dtype: str) -> float:
    """Return the greatest difference that is let pass: four times the noise, at least one step of the greatest logit.

    A step is the distance between neighbouring numbers of `dtype`, in which the logits are computed.
    """
    import numpy as np
    import torch

    finite = np.abs(spoken.logits[np.isfinite(spoken.logits)])
    return max(_TIMES_NOISE * noise, float(finite.max(initial=0.0)) * torch.finfo(getattr(torch, dtype)).eps)


def _said(request: dict[str, Any], shift_bytes: int = 0) -> Spoken:
    from ladezeit.validation.content.reference import reference_load
    from ladezeit.validation.logits.spoken import speak

    arguments: dict[str, Any] = {"trust_remote_code": request["trust_remote_code"]}
    if request["runtime"]["attn_implementation"] is not None:
        arguments["attn_implementation"] = request["runtime"]["attn_implementation"]
    if request["scheme"]:
        arguments["quantization_config"] = quantization_config(Scheme(**request["scheme"]), request["dtype"])
    model, _ = reference_load(request["folder"], request["dtype"], request["device"], **arguments)
    if shift_bytes:
        shift(model, shift_bytes)
    spoken = speak(model)
    del model
    gc.collect()
    return spoken


def shift(model: Any, bytes_: int) -> None:
    """Move each weight so that it begins `bytes_` into memory of its own; those with a layout of their own stay."""
    import torch

    for parameter in model.parameters():
        weight = parameter.data
        if type(parameter) is torch.nn.Parameter and type(weight) is torch.Tensor and weight.is_contiguous():
            first = bytes_ // weight.element_size()
            moved = torch.empty(first + weight.numel(), dtype=weight.dtype, device=weight.device)[first:]
            parameter.data = moved.view(weight.shape).copy_(weight)


if __name__ == "__main__":
    sys.exit(answer(make, sys.argv[1:]))
