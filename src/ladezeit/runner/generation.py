"""The first tokens after a load, one forward at a time, so that work a loader put off until then shows.

The ids are those of ``model.generate(do_sample=False)``, without its surroundings: prefill and first token, second
token, and the rest are phases of their own. Of the checkpoint's generation config the end-of-sequence ids and some
penalties are obeyed (see `ladezeit.model.decoding`); sampling settings have no part in a greedy continuation.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.tokenizer import read_tokenizer
from ladezeit.config import InferenceConfig
from ladezeit.errors import CheckpointError, ConfigError
from ladezeit.model.decoding import GreedyDecoder
from ladezeit.timing.clock import FIRST_TOKEN, Clock

TOKENIZER = "inference/tokenizer"
SECOND_TOKEN = "inference/second_token"
REST = "inference/rest"


@dataclass(frozen=True)
class Generation:
    """A greedy continuation.

    `metrics` are ``inference/…``, in seconds, tokens or tokens per second; one that has no meaning (no second token,
    nothing after it) is left out. `token_ids` are the new ones, with the end-of-sequence id where it came; `text` is
    what they say without special tokens, None where the checkpoint has no tokenizer.
    """

    metrics: dict[str, float]
    text: str | None
    token_ids: list[int]
    prompt_tokens: int


def generate_tokens(model: Any, folder: Path, config: InferenceConfig, clock: Clock) -> Generation:
    """Continue the prompt greedily by up to `config.new_tokens` tokens; end of sequence ends it earlier.

    Args:
        model: a causal `transformers` model, on one device or dispatched over several.
        folder: the checkpoint's folder, for its tokenizer.
        config: prompt and number of tokens; with 0 tokens nothing is done.
        clock: opens the spans ``inference/tokenizer``, ``…/first_token``, ``…/second_token`` and ``…/rest``.

    Raises:
        ConfigError: `config.token_ids` is empty or not in the model's vocabulary, where it is needed.
        CheckpointError: the tokenizer cannot be read or does not go with the model.
        LoadError: the model's logits are not finite.
    """
    if config.new_tokens == 0:
        return Generation({}, None, [], 0)
    with clock.span(TOKENIZER):
        tokenizer = read_tokenizer(folder)
        prompt = _prompt(model, tokenizer, config, folder)
    new = _continue(model, prompt, config.new_tokens, clock)
    text = None if tokenizer is None else str(tokenizer.decode(new, skip_special_tokens=True)).strip()
    return Generation(_metrics(clock, len(prompt), len(new)), text, new, len(prompt))


def _metrics(clock: Clock, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    metrics = {
        "inference/tokenizer_s": clock.duration_s(TOKENIZER),
        "inference/first_token_s": clock.duration_s(FIRST_TOKEN),
        "inference/prompt_tokens": float(prompt_tokens),
        "inference/new_tokens": float(new_tokens),
    }
    if new_tokens >= 2:
        metrics["inference/second_token_s"] = clock.duration_s(SECOND_TOKEN)
    if new_tokens >= 3:
        metrics["inference/tokens_per_s"] = (new_tokens - 2) / clock.duration_s(REST)
    return metrics


def _continue(model: Any, prompt: list[int], new_tokens: int, clock: Clock) -> list[int]:
    import torch

    stop = _end_ids(model)
    new: list[int] = []
    with torch.inference_mode():
        with clock.span(FIRST_TOKEN):
            greedy = GreedyDecoder(model, prompt)
            new.append(greedy.next_token())
        if len(new) < new_tokens and new[-1] not in stop:
            with clock.span(SECOND_TOKEN):
                new.append(greedy.next_token())
        if len(new) < new_tokens and new[-1] not in stop:
            with clock.span(REST):
                while len(new) < new_tokens and new[-1] not in stop:
                    new.append(greedy.next_token())
    return new


def _prompt(model: Any, tokenizer: Any, config: InferenceConfig, folder: Path) -> list[int]:
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    if tokenizer is not None and config.prompt:
        ids = _encoded(tokenizer, config)
        if max(ids, default=0) >= vocabulary or not ids:
            raise CheckpointError(
                f"the tokenizer in {folder} made {ids[:8]}… of the prompt, and the model embeds 0 to {vocabulary - 1}: "
                f"they do not belong together"
            )
        return ids
    ids = list(config.token_ids)
    if not ids:
        raise ConfigError(f"{folder} has no tokenizer to read inference.prompt with: set inference.token_ids")
    wrong = [token for token in ids if not 0 <= token < vocabulary]
    if wrong:
        raise ConfigError(
            f"inference.token_ids has {wrong[:5]}, and this model's vocabulary goes from 0 to {vocabulary - 1}"
        )
    return ids


def _encoded(tokenizer: Any, config: InferenceConfig) -> list[int]:
    if config.chat and getattr(tokenizer, "chat_template", None):
        conversation = [{"role": "user", "content": config.prompt}]
        encoded = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
    else:
        encoded = tokenizer(config.prompt)
    return [int(token) for token in encoded["input_ids"]]


def _end_ids(model: Any) -> set[int]:
    settings = getattr(model, "generation_config", None)
    end = getattr(settings, "eos_token_id", None)
    if end is None:
        return set()
    return set(end) if isinstance(end, list | tuple) else {end}
