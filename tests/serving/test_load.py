"""`ladezeit.load` gives a program the model that `from_pretrained` gives, by any engine, to do with as it likes."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ladezeit
from configs_for_tests import TINY_MOE, model_config
from ladezeit.config import ModelConfig, SyntheticModel
from ladezeit.errors import NotRunnableError
from ladezeit.loading import registry

#: Methods for every kind of engine that a machine without a GPU has; options of other placements cast to float16.
METHODS: dict[str, Any] = {
    "placed by a strategy": {"engine": "transformers", "device_map": "auto"},
    "moved": {"engine": "transformers", "move_to_device": True},
} | {
    name: name
    for name in (
        "auto",
        "transformers",
        "transformers_no_mmap",
        "accelerate",
        "streamed",
        "safetensors_mmap",
        "safetensors_pread",
        "fastsafetensors",
        "runai_streamer",
        "torch_dcp",
        "tensorizer",
        "gguf",
    )
}
PROMPT = [[1, 2, 3, 5, 8]]


def _untied() -> ModelConfig:
    tied = model_config("tiny")
    shape = {**tied.architecture, "tie_word_embeddings": False, "hidden_size": 64, "vocab_size": 512}
    return SyntheticModel(name="tiny-untied", architecture={**shape, "eos_token_id": 511}, seed=1, shard_bytes=200_000)


KINDS: dict[str, Any] = {
    "tied": lambda: model_config("tiny"),
    "untied, shards": _untied,
    "experts": lambda: SyntheticModel(name="tiny-moe", architecture=TINY_MOE),
    "real": lambda: model_config("smollm2-135m"),
}


@pytest.fixture(scope="module")
def plain() -> Any:
    """What transformers makes of each kind, loaded once."""
    made: dict[str, Any] = {}

    def of(folder: Path) -> Any:
        if str(folder) not in made:
            made[str(folder)] = AutoModelForCausalLM.from_pretrained(folder)
        return made[str(folder)]

    return of


def load(kind: str, method: str) -> Any:
    return ladezeit.load(KINDS[kind](), loading=METHODS[method], device="cpu")


def bits_of(tensor: Any) -> bytes:
    whole: bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return whole


def files_of(loaded: Any) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in loaded.checkpoint.shards}


@pytest.mark.parametrize("kind", [*list(KINDS)[:-1], pytest.param("real", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_the_one_of_from_pretrained(method: str, kind: str, plain: Any) -> None:
    """Who changes one line of a service gets the same weights, buffers, configs and the same text."""
    loaded = load(kind, method)
    ours, theirs = loaded.model, plain(loaded.checkpoint.folder)
    assert type(ours) is type(theirs) and not ours.training
    for mine, other in (
        (dict(ours.named_parameters()), dict(theirs.named_parameters())),
        (dict(ours.named_buffers()), dict(theirs.named_buffers())),
    ):
        assert list(mine) == list(other)
        assert all(mine[key].dtype == other[key].dtype and bits_of(mine[key]) == bits_of(other[key]) for key in mine)
        assert all(mine[key].requires_grad == other[key].requires_grad for key in mine)
    own, reference = ours.config.to_dict(), theirs.config.to_dict()
    assert {k: v for k, v in own.items() if v != reference.get(k)} == {}
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    said = [model.generate(torch.tensor(PROMPT), max_new_tokens=6, do_sample=False) for model in (ours, theirs)]
    assert torch.equal(*said)
    assert loaded.verification.passed and loaded.verification.level == "placement"
    assert loaded.chosen_by == "loading"


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_model_is_the_programs_own(method: str, tmp_path: Path) -> None:
    """Trained, cast and saved, it neither crashes nor changes the checkpoint that others load too."""
    loaded = load("tied", method)
    before, model = files_of(loaded), loaded.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.tensor(PROMPT)
    model.train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    saved = dict(again.named_parameters())
    assert all(bits_of(value) == bits_of(saved[name]) for name, value in model.named_parameters())
    assert model.to(torch.float32)(ids).logits.dtype is torch.float32
    assert files_of(loaded) == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["streamed", "safetensors_mmap"])
def test_a_loaded_model_can_be_compiled(method: str) -> None:
    """Weights that lie in a mapping of the file, at whatever offset, are as good to a compiler as any."""
    import shutil

    from torch.utils.cpp_extension import get_cxx_compiler

    if shutil.which(get_cxx_compiler()) is None:
        pytest.skip("no C++ compiler is installed")
    block = load("tied", method).model.model.layers[0].mlp  # the whole model takes a compiler minutes
    states = torch.ones(1, 5, block.gate_proj.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block)(states), block(states), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_a_real_model_answers_as_from_pretrained_does(plain: Any) -> None:
    """The three lines of the README, on a model that has something to say."""
    loaded = ladezeit.load("smollm2-135m", device="cpu")
    tokens = loaded.tokenizer("The capital of France is", return_tensors="pt")
    said = [
        loaded.tokenizer.decode(model.generate(**tokens, max_new_tokens=6, do_sample=False)[0])
        for model in (loaded.model, plain(loaded.checkpoint.folder))
    ]
    assert said[0] == said[1] and "Paris" in said[0]
    assert loaded.tokenizer is loaded.tokenizer, "read once"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "method", sorted(name for name, spec in registry.engine_specs().items() if spec.yields_tensors)
)
def test_on_a_gpu_the_model_is_the_one_of_from_pretrained(method: str, plain: Any) -> None:
    """The same on the device that services have."""
    try:
        loaded = ladezeit.load(model_config("tiny"), loading=method, device="cuda")
    except NotRunnableError as reason:
        pytest.skip(str(reason))
    theirs = dict(plain(loaded.checkpoint.folder).named_parameters())
    assert all(value.is_cuda for value in loaded.model.parameters())
    assert all(bits_of(value.cpu()) == bits_of(theirs[name]) for name, value in loaded.model.named_parameters())


@pytest.mark.gpu
def test_what_torch_keeps_of_a_gpu_is_given_back_before_a_reference_load(tmp_path: Path, monkeypatch: Any) -> None:
    """A service that had a large model before has its memory back where another process loads the reference."""
    monkeypatch.setenv("LADEZEIT_CACHE", str(tmp_path))
    large = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_reserved() >= large.nbytes
    del large
    kept: dict[str, int] = {}
    ladezeit.load(
        model_config("tiny"),
        device="cuda",
        validation="logits",
        progress=lambda what, *_: kept.setdefault(what, torch.cuda.memory_reserved()),
    )
    (reserved,) = [reserved for what, reserved in kept.items() if "two reference loads" in what]
    assert reserved < 2**30
