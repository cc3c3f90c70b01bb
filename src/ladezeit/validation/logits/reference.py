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

from ladezeit.checkpoint.identity import identity
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import MatmulPrecision, RuntimeConfig
from ladezeit.errors import CheckpointError
from ladezeit.measure.limits import available_cpus
from ladezeit.validation import kept
from ladezeit.validation.apart import answer, run_apart
from ladezeit.validation.logits.spoken import NEW_TOKENS, PROMPT_TOKENS, Spoken

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


def reference_file(
    checkpoint: Checkpoint,
    *,
    name: str,
    dtype: str,
    device: str,
    hardware: str,
    runtime: RuntimeConfig,
    cache: Path,
    trust_remote_code: bool = False,
    building: Callable[[], None] = lambda: None,
) -> Path:
    """Return the file of the reference for these files, dtype, device and settings, made where there is none.

    Args:
        checkpoint: what is loaded.
        name: of the model, for people.
        dtype: torch's name of the dtype that is asked for, never ``auto``.
        device: torch's name of the run's device.
        hardware: the product's name; another product computes other last bits.
        runtime: settings that change what is computed: attention, threads, precision.
        cache: ladezeit's cache folder.
        trust_remote_code: as in the model's config.
        building: called before a reference is made, which takes two loads.

    Raises:
        CheckpointError: the reference load failed.
    """
    from importlib.metadata import version

    settings = asdict(runtime)
    settings["matmul_precision"] = runtime.matmul_precision and runtime.matmul_precision.value
    place = {
        "folder": str(checkpoint.folder),
        "dtype": dtype,
        "device": device,
        "hardware": hardware,
        "cpus": available_cpus(),
        "runtime": settings,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "tokens": [PROMPT_TOKENS, NEW_TOKENS],
    }
    asked = {"place": place, "files": identity(checkpoint)}

    def build() -> dict[str, Any]:
        building()
        request = {
            "folder": str(checkpoint.folder),
            "dtype": dtype,
            "device": device,
            "runtime": settings,
            "trust_remote_code": trust_remote_code,
        }
        return run_apart("ladezeit.validation.logits.reference", request, f"model={name}", runtime)

    return kept.ensure(cache / FOLDER, name, asked, build)


def read(path: Path) -> Reference:
    """Read a reference file; raises `CheckpointError` where it is not there, or damaged."""
    try:
        return Reference.from_plain(kept.read(path))
    except (ValueError, TypeError, KeyError) as cause:
        raise CheckpointError(f"{path} is no reference: {cause!r}. Remove it, and it is made again") from cause


def make(request: dict[str, Any]) -> dict[str, Any]:
    """Make the reference in this process; returns plain data."""
    from ladezeit import runtime

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

    attention = request["runtime"]["attn_implementation"]
    arguments = {} if attention is None else {"attn_implementation": attention}
    model, _ = reference_load(
        request["folder"],
        request["dtype"],
        request["device"],
        trust_remote_code=request["trust_remote_code"],
        **arguments,
    )
    spoken = speak(model)
    del model
    gc.collect()
    return spoken


if __name__ == "__main__":
    sys.exit(answer(make, sys.argv[1:]))
