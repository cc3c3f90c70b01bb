"""What transformers' own load says on the run's device, and how much two such loads differ.

    python -m ladezeit.validation.logits.reference <request.json> <output.json>

The second load calibrates: what differs between two loads of the same files by the same code is the device's own noise.
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


@dataclass(frozen=True)
class Reference:
    """What the reference said, the greatest difference of logits that is let pass, and whether tokens must agree."""

    spoken: Spoken
    tolerance: float
    noise: float
    steady_tokens: bool

    def to_plain(self) -> dict[str, Any]:
        """Return plain data for `from_plain`."""
        plain = {"tolerance": self.tolerance, "noise": self.noise, "steady_tokens": self.steady_tokens}
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
    one, other = _said(request), _said(request)
    noise = one.difference(other)
    return Reference(one, tolerance(one, noise, request["dtype"]), noise, one.token_ids == other.token_ids).to_plain()


def tolerance(spoken: Spoken, noise: float, dtype: str) -> float:
    """Return the greatest difference that is let pass: four times the noise, at least one step of the greatest logit.

    A step is the distance between neighbouring numbers of `dtype`, in which the logits are computed.
    """
    import numpy as np
    import torch

    finite = np.abs(spoken.logits[np.isfinite(spoken.logits)])
    return max(_TIMES_NOISE * noise, float(finite.max(initial=0.0)) * torch.finfo(getattr(torch, dtype)).eps)


def _said(request: dict[str, Any]) -> Spoken:
    from ladezeit.validation.content.reference import reference_load
    from ladezeit.validation.logits.spoken import speak

    arguments: dict[str, Any] = {"trust_remote_code": request["trust_remote_code"]}
    if request["runtime"]["attn_implementation"] is not None:
        arguments["attn_implementation"] = request["runtime"]["attn_implementation"]
    if request["scheme"]:
        arguments["quantization_config"] = quantization_config(Scheme(**request["scheme"]), request["dtype"])
    model, _ = reference_load(request["folder"], request["dtype"], request["device"], **arguments)
    spoken = speak(model)
    del model
    gc.collect()
    return spoken


if __name__ == "__main__":
    sys.exit(answer(make, sys.argv[1:]))
