"""Synthetic checkpoints have the shape of the real ones: what is measured on them holds for those."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from checkpoint_files import QWEN2, QWEN3_MOE
from ladezeit.checkpoint import synthetic
from ladezeit.checkpoint.resolve import inspect_checkpoint, prepare_checkpoint
from ladezeit.checkpoint.synthetic import tensor_layout
from ladezeit.config import SyntheticModel
from ladezeit.errors import ConfigError

QWEN2_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def qwen2(*sizes: int, vocab_size: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        **dict(zip(QWEN2_SIZES, sizes, strict=True)),
    }


QWEN3_30B = {
    **qwen2(2048, 6144, 48, 32, 4, vocab_size=151936, tied=False),
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "decoder_sparse_step": 1,
    "head_dim": 128,
}

#: Number of tensors, length of the index (0: none) and of the shards on the hub, in bytes: Qwen2.5-0.5B, -1.5B and
#: -7B-Instruct, Qwen3-30B-A3B-Instruct-2507.
ON_THE_HUB = [
    (qwen2(896, 4864, 24, 14, 2, vocab_size=151936, tied=True), 290, 0, [988097824]),
    (qwen2(1536, 8960, 28, 12, 2, vocab_size=151936, tied=True), 338, 0, [3087467144]),
    (
        qwen2(3584, 18944, 28, 28, 4, vocab_size=152064, tied=False),
        339,
        27752,
        [3945441440, 3864726352, 3864726424, 3556377672],
    ),
    (
        QWEN3_30B,
        18867,
        1699758,
        [
            *(3998893112, 3999974192, 3997360832, 3999975056, 3999975400, 3999975400, 3999975472, 3997362064),
            *(3999975408, 3999975400, 3999975408, 3987924896, 3999975088, 3999975400, 3999975400, 1085307128),
        ],
    ),
]


@pytest.mark.parametrize(("architecture", "count", "index", "sizes"), ON_THE_HUB)
def test_files_are_as_long_as_those_on_the_hub(
    architecture: dict[str, Any], count: int, index: int, sizes: list[int]
) -> None:
    """Names, shapes and division into files agree: shards, headers and index have the real ones' length to the byte."""
    specs = tensor_layout(architecture)
    shards = synthetic.plan_shards(specs, 4 * 1000**3)
    found = [len(shard.header) + sum(specs[number].byte_count for number in shard.tensors) for shard in shards]
    assert len(specs) == count
    assert found == sizes
    if index:
        assert len(synthetic.index_json(specs, shards)) == index
    else:
        assert [shard.name for shard in shards] == ["model.safetensors"], "the only file needs no index"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "architecture", [QWEN2, QWEN3_MOE, {**QWEN3_MOE, "attention_bias": True, "mlp_only_layers": [0]}]
)
def test_transformers_loads_every_tensor(tmp_path: Path, architecture: dict[str, Any], tied: bool) -> None:
    """No key is missing, unexpected or mismatched, the embeddings are tied as asked, and a forward pass is finite."""
    import torch
    from transformers import AutoModelForCausalLM

    model = SyntheticModel(name="s", architecture={**architecture, "tie_word_embeddings": tied}, shard_bytes=50_000)
    folder = prepare_checkpoint(model, tmp_path).folder
    loaded, said = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.generation_config.eos_token_id == 255
    for precision in (torch.bfloat16, torch.float16):
        with torch.inference_mode():
            logits = loaded.to(precision)(torch.tensor([[1, 2, 3]])).logits
        assert logits.isfinite().all()
        assert logits.std() > 0


def test_headers_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    """The same tensors saved by the safetensors library give the same file."""
    folder = prepare_checkpoint(SyntheticModel(name="s", architecture=QWEN2), tmp_path).folder
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_an_index_is_written_where_there_are_several_shards(tmp_path: Path) -> None:
    """Shards are numbered, bounded by ``shard_bytes``, and agree with the index."""
    found = inspect_checkpoint(
        prepare_checkpoint(SyntheticModel(name="s", architecture=QWEN2, shard_bytes=60_000), tmp_path).folder, "s"
    )
    count = len(found.shards)
    assert count > 1
    assert [shard.name for shard in found.shards] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    assert all(shard.stat().st_size < 62_000 for shard in found.shards)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen22"}, "Did you mean 'qwen2'"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_size": None}, "hidden_size=None is needed"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is needed"),
        ({"vocab_size": "many"}, "vocab_size=many is needed"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
        ({"torch_dtype": "float32"}, "synthetic ones are bfloat16"),
    ],
)
def test_an_impossible_architecture_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """A typing error in an option file is named before anything is written."""
    with pytest.raises(ConfigError, match=message):
        prepare_checkpoint(SyntheticModel(name="s", architecture={**QWEN2, **change}), tmp_path)
    assert not list(tmp_path.iterdir())
