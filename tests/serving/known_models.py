"""A checkpoint whose answer is known, and how a loaded model is asked for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT = (1, 2, 3, 4)
NEW_TOKENS = 6


@dataclass(frozen=True)
class Known:
    """A checkpoint and the tokens that its model answers `PROMPT` with."""

    name: str
    folder: Path
    tokens: tuple[int, ...]
    bytes: int


def says(model: Any) -> tuple[int, ...]:
    """Return what `model` answers `PROMPT` with, greedily."""
    import torch

    device = next(model.parameters()).device
    ids = torch.tensor([PROMPT], device=device)
    spoken = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(spoken[0, len(PROMPT) :].tolist())


def expected(model: Known, device: str) -> tuple[int, ...]:
    """Return what the checkpoint says on `device`, loaded by nothing but `from_pretrained`."""
    if device == "cpu":
        return model.tokens
    from transformers import AutoModelForCausalLM

    return says(AutoModelForCausalLM.from_pretrained(model.folder, device_map=device))
