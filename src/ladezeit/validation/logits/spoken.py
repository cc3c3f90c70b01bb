"""What a model says to a fixed prompt: the logits of the first token, and the greedy continuation."""

import base64
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np

PROMPT_TOKENS = 16
NEW_TOKENS = 8


@dataclass(frozen=True)
class Spoken:
    """Logits of the first new token (float32, one a vocabulary entry) and the ids of `NEW_TOKENS` greedy tokens.

    `leads` says of each token how far its logit was ahead of the next best.
    """

    logits: "np.ndarray[Any, np.dtype[np.float32]]"
    token_ids: list[int]
    leads: list[float]

    def difference(self, other: "Spoken") -> float:
        """Return the greatest difference of two logits, infinite where only one of them is a number."""
        if self.logits.shape != other.logits.shape:
            return float("inf")
        with np.errstate(invalid="ignore"):
            apart = np.abs(self.logits.astype(np.float64) - other.logits)
        same = (self.logits == other.logits) | (np.isnan(self.logits) & np.isnan(other.logits))
        return float(np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart)).max(initial=0.0))

    def agreed(self, other: "Spoken") -> int:
        """Return how many tokens the two have in common before the first that differs."""
        pairs = zip(self.token_ids, other.token_ids, strict=True)
        return next((number for number, (own, its) in enumerate(pairs) if own != its), len(self.token_ids))

    def to_plain(self) -> dict[str, Any]:
        """Return plain data for `from_plain`."""
        raw = np.ascontiguousarray(self.logits, dtype="<f4").tobytes()
        return {"logits": base64.b64encode(raw).decode(), "token_ids": self.token_ids, "leads": self.leads}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Spoken":
        """Rebuild what `to_plain` returned."""
        logits = np.frombuffer(base64.b64decode(plain["logits"]), dtype="<f4")
        return cls(logits, [int(token) for token in plain["token_ids"]], [float(lead) for lead in plain["leads"]])


def speak(model: Any) -> Spoken:
    """Let a causal `transformers` model continue a prompt of ids spread over its vocabulary; it ends at no token."""
    import torch

    from ladezeit.sample.inference import input_device

    vocabulary = int(model.get_input_embeddings().num_embeddings)
    ids = [(number * 7919 + 1) % vocabulary for number in range(PROMPT_TOKENS)]
    fed = torch.tensor([ids], device=input_device(model))
    takes = inspect.signature(model.forward).parameters
    arguments = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    said: list[int] = []
    leads: list[float] = []
    first = None
    kept = None
    with torch.inference_mode():
        while len(said) < NEW_TOKENS:
            output = model(input_ids=fed, past_key_values=kept, use_cache=True, **arguments)
            kept = output.past_key_values
            logits = output.logits[0, -1].to(torch.float32)
            first = logits.cpu().numpy() if first is None else first
            best, second = logits.topk(2).values.tolist()
            said.append(int(logits.argmax()))
            leads.append(best - second)
            fed = torch.tensor([said[-1:]], device=fed.device)
    assert first is not None
    return Spoken(first, said, leads)
