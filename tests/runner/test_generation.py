"""The first tokens: the same ids as the library's own, with a clock around each that means what it says."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ladezeit.config import InferenceConfig
from ladezeit.errors import CheckpointError, ConfigError, LoadError
from ladezeit.runner.generation import Generation, generate_tokens
from ladezeit.timing.clock import Clock

PROMPT = [5, 6, 7, 8, 9, 5, 6]
ASKED = InferenceConfig(new_tokens=12, token_ids=PROMPT)


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        initializer_range=0.3,  # wide enough that random weights say different things at each step
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config).to(dtype).eval()


def spoken(model: Any, folder: Path, config: InferenceConfig = ASKED) -> tuple[Generation, Clock]:
    clock = Clock(time.monotonic_ns())
    return generate_tokens(model, folder, config, clock), clock


def librarys_own(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
    mask = torch.ones_like(ids)
    said = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
    return said[0, len(prompt) :].tolist()


def save_tokenizer(folder: Path, chat_template: str | None = None, end: str = "<end>") -> None:
    words = {"<end>": 0, "[unk]": 1, "hello": 2, "world": 3, "user": 4} | {f"w{n}": n for n in range(5, 256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]", eos_token=end)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_ids_are_those_of_the_librarys_greedy_generation(dtype: torch.dtype, penalty: float, tmp_path: Path) -> None:
    """What a sample shows as the model's answer is what the user gets from `generate`, penalties included."""
    model = tiny_model(dtype)
    model.generation_config.repetition_penalty = penalty
    found, _ = spoken(model, tmp_path)
    assert found.token_ids == librarys_own(model, PROMPT, 12)
    assert len(set(found.token_ids)) > 1


@pytest.mark.parametrize("key", ["no_repeat_ngram_size", "suppress_tokens"])
def test_other_settings_that_change_greedy_ids_are_obeyed(key: str, tmp_path: Path) -> None:
    """A checkpoint that forbids repetitions or tokens says the same here as with `generate`."""
    model = tiny_model()
    plain = librarys_own(model, PROMPT, 12)
    setattr(model.generation_config, key, {"no_repeat_ngram_size": 2, "suppress_tokens": plain[:2]}[key])
    found, _ = spoken(model, tmp_path)
    assert found.token_ids == librarys_own(model, PROMPT, 12)


def test_a_mixture_of_experts_says_the_same(tmp_path: Path) -> None:
    """Models whose experts are fused on loading speak as the library lets them."""
    config = Qwen3MoeConfig(
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).eval()
    assert spoken(model, tmp_path)[0].token_ids == librarys_own(model, PROMPT, 12)


@pytest.mark.parametrize("where", ["host", "disk"])
def test_an_offloaded_model_says_the_same(where: str, tmp_path: Path) -> None:
    """A model that accelerate brings in piece by piece can be sampled too, and gives the same answer."""
    model = tiny_model()
    expected = librarys_own(model, PROMPT, 12)
    if where == "host":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert spoken(model, tmp_path)[0].token_ids == expected


def test_a_model_dispatched_by_a_device_map_says_the_same(tmp_path: Path) -> None:
    """Layers on disk through `from_pretrained` are what an allowed offload looks like in a sweep."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    dispatched = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")
    assert spoken(dispatched, tmp_path)[0].token_ids == librarys_own(model, PROMPT, 12)


def test_the_first_two_tokens_are_timed_apart_from_the_rest(tmp_path: Path) -> None:
    """A loader that defers its work to the first forward shows it there; the tokenizer is not booked on it."""
    found, clock = spoken(tiny_model(), tmp_path)
    assert [phase.path for phase in clock.phases] == [
        "inference/tokenizer",
        "inference/first_token",
        "inference/second_token",
        "inference/rest",
    ]
    assert set(found.metrics) == {
        "inference/tokenizer_s",
        "inference/first_token_s",
        "inference/second_token_s",
        "inference/tokens_per_s",
        "inference/prompt_tokens",
        "inference/new_tokens",
    }
    assert found.metrics["inference/first_token_s"] == clock.duration_s("inference/first_token")
    assert found.metrics["inference/tokens_per_s"] == pytest.approx(10 / clock.duration_s("inference/rest"))
    assert found.metrics["inference/prompt_tokens"] == found.prompt_tokens == len(PROMPT)


@pytest.mark.parametrize(("new_tokens", "absent"), [(1, {"second_token_s", "tokens_per_s"}), (2, {"tokens_per_s"})])
def test_a_rate_of_nothing_is_left_out(new_tokens: int, absent: set[str], tmp_path: Path) -> None:
    """Too few tokens for a rate give no rate, rather than a wrong one."""
    found, _ = spoken(tiny_model(), tmp_path, replace(ASKED, new_tokens=new_tokens))
    assert len(found.token_ids) == new_tokens
    assert not {f"inference/{name}" for name in absent} & set(found.metrics)


def test_no_tokens_asked_for_is_nothing_done(tmp_path: Path) -> None:
    """`inference=none` runs no forward at all."""
    found, clock = spoken(tiny_model(), tmp_path, InferenceConfig(new_tokens=0))
    assert (found.token_ids, found.metrics, clock.phases) == ([], {}, [])


@pytest.mark.parametrize("as_list", [False, True])
def test_the_end_of_sequence_ends_it_and_the_rate_counts_what_was_said(as_list: bool, tmp_path: Path) -> None:
    """An answer that ends early is not counted as if it had gone on."""
    model = tiny_model()
    said = librarys_own(model, PROMPT, 12)
    last = next(n for n in range(3, 12) if said[n] not in said[:n])
    model.generation_config.eos_token_id = [said[last], 255] if as_list else said[last]
    found, clock = spoken(model, tmp_path)
    assert found.token_ids == said[: last + 1] == librarys_own(model, PROMPT, 12)
    assert found.metrics["inference/new_tokens"] == last + 1
    assert found.metrics["inference/tokens_per_s"] == pytest.approx((last - 1) / clock.duration_s("inference/rest"))


def test_the_text_is_what_the_ids_say_without_special_tokens(tmp_path: Path) -> None:
    """The answer in the report is readable, and ends where the model ended it."""
    model = tiny_model()
    said = librarys_own(model, [2, 3, 9], 12)
    last = next(n for n in range(3, 12) if said[n] not in said[:n] and said[n] > 4)
    model.generation_config.eos_token_id = said[last]
    save_tokenizer(tmp_path, end=f"w{said[last]}")
    found, _ = spoken(model, tmp_path, InferenceConfig(new_tokens=12, prompt="hello world w9"))
    assert found.prompt_tokens == 3
    assert found.token_ids == said[: last + 1]
    assert found.text is not None
    words = ["<end>", "[unk]", "hello", "world", "user", *(f"w{n}" for n in range(5, 256))]
    assert found.text.split() == [words[token] for token in said[:last]]


def test_the_chat_template_is_used_where_there_is_one_and_it_was_asked_for(tmp_path: Path) -> None:
    """An instruct model is spoken to as it was trained to be."""
    save_tokenizer(tmp_path, "{% for m in messages %}user {{ m.content }} {% endfor %}w99")
    config = InferenceConfig(new_tokens=1, prompt="hello", chat=True)
    assert spoken(tiny_model(), tmp_path, config)[0].prompt_tokens == 3
    assert spoken(tiny_model(), tmp_path, replace(config, chat=False))[0].prompt_tokens == 1


def test_without_a_tokenizer_the_ids_of_the_config_are_the_prompt(tmp_path: Path) -> None:
    """A synthetic checkpoint has no tokenizer and is sampled all the same; there is no text then."""
    found, _ = spoken(tiny_model(), tmp_path, replace(ASKED, prompt="not readable here"))
    assert found.text is None
    assert found.prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("ids", [[5, 256], [-1]])
def test_ids_outside_the_vocabulary_are_refused_before_the_forward(ids: list[int], tmp_path: Path) -> None:
    """A GPU would die of such an id with a message that names neither it nor the cause."""
    with pytest.raises(ConfigError, match=r"inference\.token_ids has .* from 0 to 255"):
        spoken(tiny_model(), tmp_path, InferenceConfig(new_tokens=1, token_ids=ids))


def test_no_prompt_at_all_is_refused(tmp_path: Path) -> None:
    """The user hears which key to set."""
    with pytest.raises(ConfigError, match=r"set inference\.token_ids"):
        spoken(tiny_model(), tmp_path, InferenceConfig(new_tokens=1, prompt="hello"))


def test_a_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    """Ids beyond the embedding mean that tokenizer and weights do not belong together."""
    save_tokenizer(tmp_path)
    model = tiny_model()
    model.resize_token_embeddings(8)
    with pytest.raises(CheckpointError, match="do not belong together"):
        spoken(model, tmp_path, InferenceConfig(new_tokens=1, prompt="w200"))


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    """The user hears that the tokenizer is at fault, not the model."""
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(CheckpointError, match=r"tokenizer in .* cannot be read"):
        spoken(tiny_model(), tmp_path, InferenceConfig(new_tokens=1, prompt="hello"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_the_load(value: float, tmp_path: Path) -> None:
    """Damaged weights do not become an answer of exclamation marks in a report."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[17] = value
    with pytest.raises(LoadError, match="not finite"):
        spoken(model, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_on_the_gpu_says_what_the_library_says(dtype: torch.dtype, tmp_path: Path) -> None:
    """Prompt and penalties go where the model is; ids equal the library's on the same GPU."""
    model = tiny_model(dtype).to("cuda:0")
    model.generation_config.repetition_penalty = 1.1
    clock = Clock(time.monotonic_ns(), synchronize=lambda path: torch.cuda.synchronize())
    assert generate_tokens(model, tmp_path, ASKED, clock).token_ids == librarys_own(model, PROMPT, 12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_model_offloaded_from_the_gpu_says_the_same(tmp_path: Path) -> None:
    """Weights that live on the host and compute on the GPU find their prompt there."""
    model = tiny_model().to("cuda:0")
    expected = librarys_own(model, PROMPT, 12)
    cpu_offload(model.to("cpu"), execution_device=torch.device("cuda:0"))
    assert spoken(model, tmp_path)[0].token_ids == expected
