"""Which tensors an architecture's checkpoint has, under the names and in the order of the hub's checkpoints.

The order decides which tensor lands in which shard; with shards of 4 GB the files have exactly the sizes of those on
the hub (Qwen2.5 0.5B, 1.5B and 7B, Qwen3-30B-A3B), which the tests check.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ladezeit.errors import ConfigError, did_you_mean

#: What a tensor's values must look like for the model to compute with finite numbers.
Role = Literal["weight", "norm", "bias"]


@dataclass(frozen=True)
class TensorSpec:
    """One bf16 tensor to write."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def elements(self) -> int:
        """How many values it has."""
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def byte_count(self) -> int:
        """How many bytes its values take in bf16."""
        return 2 * self.elements


def layout(architecture: dict[str, Any]) -> list[TensorSpec]:
    """Return the tensors of the config.json `architecture`, in the order in which they fill shards.

    Raises:
        ConfigError: its ``model_type`` is not known here, or a size is missing or not a positive whole number.
    """
    model_type = architecture.get("model_type")
    make = _LAYOUTS.get(str(model_type))
    if make is None:
        raise ConfigError(
            f"model.architecture has model_type={model_type}, whose checkpoint layout is not known here. Known are "
            f"{', '.join(_LAYOUTS)}." + did_you_mean(str(model_type), _LAYOUTS)
        )
    return list(make(_Sizes(architecture)))


class _Sizes:
    """The sizes in a config.json, checked when they are read."""

    def __init__(self, architecture: dict[str, Any]) -> None:
        self.architecture = architecture
        self.hidden = self("hidden_size")
        self.layers = self("num_hidden_layers")
        self.heads = self("num_attention_heads")
        self.key_value_heads = self("num_key_value_heads")
        self.head = self("head_dim") if architecture.get("head_dim") else self.hidden // self.heads
        self.vocabulary = self("vocab_size")
        self.tied = self.flag("tie_word_embeddings", False)

    def __call__(self, key: str) -> int:
        value = self.architecture.get(key)
        if type(value) is not int or value < 1:
            raise ConfigError(f"model.architecture.{key}={value} is needed as a positive whole number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.architecture.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"model.architecture.{key}={value} must be true or false")
        return value


def _qwen2(sizes: _Sizes) -> Iterator[TensorSpec]:
    yield _weight("model.embed_tokens", sizes.vocabulary, sizes.hidden)
    for number in range(sizes.layers):
        layer = f"model.layers.{number}"
        yield _norm(f"{layer}.input_layernorm", sizes.hidden)
        yield from _attention(f"{layer}.self_attn", sizes, biases=("q_proj", "k_proj", "v_proj"))
        yield _norm(f"{layer}.post_attention_layernorm", sizes.hidden)
        yield from _dense(f"{layer}.mlp", sizes.hidden, sizes("intermediate_size"))
    yield from _end(sizes)


def _qwen3_moe(sizes: _Sizes) -> Iterator[TensorSpec]:
    experts, step = sizes("num_experts"), sizes("decoder_sparse_step")
    dense_layers = sizes.architecture.get("mlp_only_layers") or []
    biases = ("q_proj", "k_proj", "v_proj", "o_proj") if sizes.flag("attention_bias", False) else ()
    yield _weight("model.embed_tokens", sizes.vocabulary, sizes.hidden)
    for number in range(sizes.layers):
        layer = f"model.layers.{number}"
        yield from _attention(f"{layer}.self_attn", sizes, biases)
        yield _norm(f"{layer}.self_attn.q_norm", sizes.head)
        yield _norm(f"{layer}.self_attn.k_norm", sizes.head)
        if number in dense_layers or (number + 1) % step:
            yield from _dense(f"{layer}.mlp", sizes.hidden, sizes("intermediate_size"))
        else:
            for expert in range(experts):
                yield from _expert(f"{layer}.mlp.experts.{expert}", sizes.hidden, sizes("moe_intermediate_size"))
            yield _weight(f"{layer}.mlp.gate", experts, sizes.hidden)
        yield _norm(f"{layer}.input_layernorm", sizes.hidden)
        yield _norm(f"{layer}.post_attention_layernorm", sizes.hidden)
    yield from _end(sizes)


_LAYOUTS: dict[str, Callable[[_Sizes], Iterator[TensorSpec]]] = {"qwen2": _qwen2, "qwen3_moe": _qwen3_moe}


def _attention(prefix: str, sizes: _Sizes, biases: tuple[str, ...]) -> Iterator[TensorSpec]:
    queries, keys = sizes.heads * sizes.head, sizes.key_value_heads * sizes.head
    shapes = {
        "q_proj": (queries, sizes.hidden),
        "k_proj": (keys, sizes.hidden),
        "v_proj": (keys, sizes.hidden),
        "o_proj": (sizes.hidden, queries),
    }
    for name, shape in shapes.items():
        yield _weight(f"{prefix}.{name}", *shape)
        if name in biases:
            yield TensorSpec(f"{prefix}.{name}.bias", shape[:1], "bias")


def _dense(prefix: str, hidden: int, intermediate: int) -> Iterator[TensorSpec]:
    yield _weight(f"{prefix}.gate_proj", intermediate, hidden)
    yield _weight(f"{prefix}.up_proj", intermediate, hidden)
    yield _weight(f"{prefix}.down_proj", hidden, intermediate)


def _expert(prefix: str, hidden: int, intermediate: int) -> Iterator[TensorSpec]:
    gate, up, down = _dense(prefix, hidden, intermediate)
    yield from (up, gate, down)  # as the real shards are divided


def _end(sizes: _Sizes) -> Iterator[TensorSpec]:
    yield _norm("model.norm", sizes.hidden)
    if not sizes.tied:
        yield _weight("lm_head", sizes.vocabulary, sizes.hidden)


def _weight(module: str, *shape: int) -> TensorSpec:
    return TensorSpec(f"{module}.weight", shape, "weight")


def _norm(module: str, size: int) -> TensorSpec:
    return TensorSpec(f"{module}.weight", (size,), "norm")
