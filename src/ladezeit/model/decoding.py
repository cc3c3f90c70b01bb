"""Greedy decoding, one forward at a time, with the ids of ``model.generate(do_sample=False)``."""

import inspect
import math
from collections.abc import Callable
from typing import Any

from ladezeit.errors import LoadError

#: Keys of a generation config that change greedy ids, with transformers' class that does it and the key's idle values.
_PENALTIES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "repetition_penalty": ("RepetitionPenaltyLogitsProcessor", (None, 1.0)),
    "no_repeat_ngram_size": ("NoRepeatNGramLogitsProcessor", (None, 0)),
    "suppress_tokens": ("SuppressTokensLogitsProcessor", (None, [])),
}


class GreedyDecoder:
    """Yields one id per forward; keeps what the model keeps between forwards.

    Args:
        model: a causal `transformers` model.
        prompt: the ids that it continues.
        penalties: whether those of its generation config count.
    """

    def __init__(self, model: Any, prompt: list[int], *, penalties: bool = True) -> None:
        import torch

        self._model = model
        self._ids = torch.tensor([prompt], device=input_device(model))
        self._cache: Any = None
        self._penalties = _penalties(model) if penalties else []
        # Logits of the last position are enough: those of a whole prompt can take gigabytes.
        takes = inspect.signature(model.forward).parameters
        self._arguments = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def next_logits(self) -> Any:
        """Return the logits of the id that follows, float32 of shape ``(1, vocabulary)``."""
        import torch

        fed = self._ids if self._cache is None else self._ids[:, -1:]
        output = self._model(input_ids=fed, past_key_values=self._cache, use_cache=True, **self._arguments)
        self._cache = getattr(output, "past_key_values", None)
        logits = output.logits[:, -1, :].to(self._ids.device, torch.float32)
        for penalty in self._penalties:
            logits = penalty(self._ids, logits)
        return logits

    def append_id(self, chosen: Any) -> None:
        """Continue with an id, a tensor of shape ``(1,)``."""
        import torch

        self._ids = torch.cat([self._ids, chosen[:, None]], dim=1)

    def next_token(self) -> int:
        """Return the id that follows; raises `LoadError` where the logits are not finite."""
        logits = self.next_logits()
        chosen = logits.argmax(dim=-1)
        # argmax takes NaN for the greatest, so the chosen logit tells of any; -inf elsewhere is a model's own mask.
        value = float(logits[0, chosen])
        if not math.isfinite(value):
            raise LoadError(
                f"the model's logits are not finite ({value} after {self._ids.shape[1]} tokens): its weights are "
                f"damaged, were not all loaded, or its dtype is too narrow. Try loading.dtype=float32"
            )
        self.append_id(chosen)
        return int(chosen)


def _penalties(model: Any) -> list[Callable[[Any, Any], Any]]:
    from transformers.generation import logits_process

    settings = getattr(model, "generation_config", None)
    asked = {key: getattr(settings, key, None) for key in _PENALTIES}
    return [
        getattr(logits_process, cls)(asked[key]) for key, (cls, idle) in _PENALTIES.items() if asked[key] not in idle
    ]


def input_device(model: Any) -> Any:
    """Return where ids are to be: beside the embedding, or where its hook will bring it when it is offloaded."""
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    if device.type != "meta":
        return device
    return getattr(getattr(embedding, "_hf_hook", None), "execution_device", None) or "cpu"
