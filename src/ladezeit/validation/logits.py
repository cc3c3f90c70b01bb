"""What transformers' own load says on the run's device, and how much two such loads differ.

    python -m ladezeit.validation.logits <request.json> <answer.json>

The second load calibrates: its weights lie elsewhere, as another engine's would, and what it says differently is the
device's own noise. Libraries choose their kernels by a weight's address too, and each rounds in its own way.
"""

import base64
import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ladezeit.config import MatmulPrecision, RuntimeConfig
from ladezeit.errors import CheckpointError
from ladezeit.loading.quantization import Scheme, quantization_config
from ladezeit.system.limits import available_cpus
from ladezeit.system.processes import answer_request
from ladezeit.validation import reference_cache
from ladezeit.validation.faults import Fault
from ladezeit.validation.reference_cache import ReferenceKey
from ladezeit.validation.verification import Finding, LevelReport

#: In the cache folder.
FOLDER = "logits"
#: The noise of two loads is a sample of one: what is let pass is a multiple of it.
_TIMES_NOISE = 4.0
#: How far into memory of their own the second load's weights begin: the least that every engine here keeps to on a GPU.
_SHIFT_BYTES = 16

#: What no forward survives unchanged; of other faults it finds those that this prompt happens to feel.
CLAIMS = frozenset(
    {
        Fault.nan_in_file,
        Fault.planted_nan,
        Fault.missing_tensor,
        Fault.buffer_on_meta,
        Fault.weight_on_meta,
        Fault.overwritten_buffer,
    }
)

PROMPT_TOKENS = 16
NEW_TOKENS = 8


# What a model says to a fixed prompt: the logits of the first token, and the greedy continuation.


@dataclass(frozen=True)
class GreedyOutput:
    """Logits of the first new token (float32, one a vocabulary entry) and the ids of `NEW_TOKENS` greedy tokens.

    `leads` says of each token how far its logit was ahead of the next best.
    """

    logits: "np.ndarray[Any, np.dtype[np.float32]]"
    token_ids: list[int]
    leads: list[float]

    def max_difference(self, other: "GreedyOutput") -> float:
        """Return the greatest difference of two logits, infinite where only one of them is a number."""
        if self.logits.shape != other.logits.shape:
            return float("inf")
        with np.errstate(invalid="ignore"):
            apart = np.abs(self.logits.astype(np.float64) - other.logits)
        same = (self.logits == other.logits) | (np.isnan(self.logits) & np.isnan(other.logits))
        return float(np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart)).max(initial=0.0))

    def count_agreed(self, other: "GreedyOutput") -> int:
        """Return how many tokens the two have in common before the first that differs."""
        pairs = zip(self.token_ids, other.token_ids, strict=True)
        return next((number for number, (own, its) in enumerate(pairs) if own != its), len(self.token_ids))

    def to_plain(self) -> dict[str, Any]:
        """Return plain data for `from_plain`."""
        raw = np.ascontiguousarray(self.logits, dtype="<f4").tobytes()
        return {"logits": base64.b64encode(raw).decode(), "token_ids": self.token_ids, "leads": self.leads}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "GreedyOutput":
        """Rebuild what `to_plain` returned."""
        logits = np.frombuffer(base64.b64decode(plain["logits"]), dtype="<f4")
        return cls(logits, [int(token) for token in plain["token_ids"]], [float(lead) for lead in plain["leads"]])


@dataclass(frozen=True)
class Reference:
    """What the reference said, the greatest difference of logits that is let pass, and how many tokens are sure.

    A token is sure where both loads said it, and no difference that is let pass could put another in its place.
    """

    spoken: GreedyOutput
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
        return cls(**{**plain, "spoken": GreedyOutput.from_plain(plain["spoken"])})


def reference_file(subject: ReferenceKey, runtime: RuntimeConfig, building: Callable[[], None] = lambda: None) -> Path:
    """Return the file of the reference for `subject` by these settings, made where there is none for its files.

    A quantized one is loaded by transformers with the same quantizer. `runtime` are settings that change what is
    computed: attention, threads, precision. `building` is called before a reference is made, which takes two loads.

    Raises:
        CheckpointError: the reference load failed.
    """
    settings = asdict(runtime)
    settings["matmul_precision"] = runtime.matmul_precision and runtime.matmul_precision.value
    place = {
        **subject.describe_place(),
        "device": subject.device,
        "hardware": subject.hardware,
        "cpus": available_cpus(),
        "runtime": settings,
        "tokens": [PROMPT_TOKENS, NEW_TOKENS],
        "shift_bytes": _SHIFT_BYTES,
    }

    def build() -> dict[str, Any]:
        building()
        request = {**subject.make_request(), "runtime": settings}
        return reference_cache.run_reference("ladezeit.validation.logits", subject, request, runtime)

    return reference_cache.ensure_file(
        subject.cache / FOLDER, subject.name, {"place": place, "files": subject.files_identity()}, build
    )


def read_reference(path: Path) -> Reference:
    """Read a reference file; raises `CheckpointError` where it is not there, or damaged."""
    try:
        return Reference.from_plain(reference_cache.read_file(path))
    except (ValueError, TypeError, KeyError) as cause:
        raise CheckpointError(f"{path} is no reference: {cause!r}. Remove it, and it is made again") from cause


def make(request: dict[str, Any]) -> dict[str, Any]:
    """Make the reference in this process; returns plain data."""
    from ladezeit.system import torch_settings

    settings = dict(request["runtime"])
    if settings["matmul_precision"] is not None:
        settings["matmul_precision"] = MatmulPrecision(settings["matmul_precision"])
    torch_settings.apply_settings(RuntimeConfig(**settings), request["device"])
    one, other = _run_reference(request), _run_reference(request, _SHIFT_BYTES)
    noise = one.max_difference(other)
    passing = compute_tolerance(one, noise, request["dtype"])
    return Reference(one, passing, noise, sure_tokens(one, other, passing)).to_plain()


def sure_tokens(one: GreedyOutput, other: GreedyOutput, passing: float) -> int:
    """Return how many of the first tokens every load has to say whose logits differ by no more than `passing`.

    Of two logits one may fall by that much and the other rise: a token that is ahead by no more than twice as much may
    lose its place.
    """
    leading = (number for number, lead in enumerate(one.leads) if not lead > 2 * passing)
    return min(one.count_agreed(other), next(leading, len(one.leads)))


def compute_tolerance(spoken: GreedyOutput, noise: float, dtype: str) -> float:
    """Return the greatest difference that is let pass: four times the noise, at least one step of the greatest logit.

    A step is the distance between neighboring numbers of `dtype`, in which the logits are computed.
    """
    import numpy as np
    import torch

    finite = np.abs(spoken.logits[np.isfinite(spoken.logits)])
    return max(_TIMES_NOISE * noise, float(finite.max(initial=0.0)) * torch.finfo(getattr(torch, dtype)).eps)


def _run_reference(request: dict[str, Any], shift_bytes: int = 0) -> GreedyOutput:
    from ladezeit.validation.manifest import reference_load

    arguments: dict[str, Any] = {"trust_remote_code": request["trust_remote_code"]}
    if request["runtime"]["attn_implementation"] is not None:
        arguments["attn_implementation"] = request["runtime"]["attn_implementation"]
    if request["scheme"]:
        arguments["quantization_config"] = quantization_config(Scheme(**request["scheme"]), request["dtype"])
    model, _ = reference_load(request["folder"], request["dtype"], request["device"], **arguments)
    if shift_bytes:
        shift_weights(model, shift_bytes)
    spoken = run_greedy(model)
    del model
    gc.collect()
    return spoken


def shift_weights(model: Any, bytes_: int) -> None:
    """Move each weight so that it begins `bytes_` into memory of its own; those with a layout of their own stay."""
    import torch

    for parameter in model.parameters():
        weight = parameter.data
        if type(parameter) is torch.nn.Parameter and type(weight) is torch.Tensor and weight.is_contiguous():
            first = bytes_ // weight.element_size()
            moved = torch.empty(first + weight.numel(), dtype=weight.dtype, device=weight.device)[first:]
            parameter.data = moved.view(weight.shape).copy_(weight)


# The level `logits`: first-token logits and greedy continuation against the reference's, after the sample's tokens.


def check_logits(model: Any, reference: Reference) -> LevelReport:
    """Let the model continue the reference's prompt, and compare."""
    spoken = run_greedy(model)
    apart = reference.spoken.max_difference(spoken)
    said, sure = reference.spoken.count_agreed(spoken), reference.sure_tokens
    findings = []
    if not apart <= reference.tolerance:
        what = f"are up to {apart:.3g} from the reference's; the tolerance is {reference.tolerance:.3g}"
        findings.append(Finding("logits", "", f"the first token's {what}"))
    if said < sure:
        what = f"{spoken.token_ids} where the reference says {reference.spoken.token_ids}, the first {sure} for sure"
        findings.append(Finding("tokens", "", f"the greedy continuation is {what}"))
    every = len(spoken.token_ids)
    return LevelReport(
        summary=f"first-token logits within {apart:.3g} of a reference load on this device "
        f"(two reference loads: {reference.noise:.3g}), {said} of {every} greedy tokens equal ({sure} are sure to be)",
        findings=findings,
        metrics={
            "validation/logits_difference": apart,
            "validation/logits_tolerance": reference.tolerance,
            "validation/tokens_equal": float(said == every),
        },
    )


def run_greedy(model: Any) -> GreedyOutput:
    """Let a causal `transformers` model continue a prompt of ids spread over its vocabulary; it ends at no token."""
    import torch

    from ladezeit.model.decoding import GreedyDecoder

    vocabulary = int(model.get_input_embeddings().num_embeddings)
    ids = [(number * 7919 + 1) % vocabulary for number in range(PROMPT_TOKENS)]
    decoder = GreedyDecoder(model, ids, penalties=False)
    said: list[int] = []
    leads: list[float] = []
    first = None
    with torch.inference_mode():
        while len(said) < NEW_TOKENS:
            logits = decoder.next_logits()
            first = logits[0].cpu().numpy() if first is None else first
            best, second = logits[0].topk(2).values.tolist()
            chosen = logits.argmax(dim=-1)
            decoder.append_id(chosen)
            said.append(int(chosen))
            leads.append(best - second)
    assert first is not None
    return GreedyOutput(first, said, leads)


if __name__ == "__main__":
    sys.exit(answer_request(make, sys.argv[1:]))
