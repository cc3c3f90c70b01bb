"""Writes checkpoints as GGUF, every bit kept: bfloat16, float16 and float32 as they are, nothing quantized.

What llama.cpp's own converter does to names and layouts is done here too, because readers undo it: tensors have its
names, rows of llama's query and key are interleaved, and the experts of a layer are one tensor. The tokenizer stays in
the checkpoint. See https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.safetensors_header import TensorEntry
from ladezeit.errors import CheckpointError, NotRunnableError
from ladezeit.loading.conversion import read_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Version of this code: raise it when the same checkpoint would give another file.
_CONVERTER = 1
#: GGUF's names of the model types that transformers' GGUF loader reads back bit for bit, as tests show.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
#: GGUF's number of each dtype that is kept as it is (`gguf.GGMLQuantizationType`), and its bytes.
_DTYPES = {"F32": (0, 4), "F16": (1, 2), "BF16": (30, 2)}
#: Bytes besides the weights: each tensor's entry and padding; the metadata.
_ENTRY_BYTES = 256
_METADATA_BYTES = 64 * 1024

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file and what it is made of: one of the checkpoint's, or a layer's experts in their order."""

    name: str
    entries: tuple[TensorEntry, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        own = self.entries[0].shape
        return (len(self.entries), *own) if self.stacked else own


class GgufConverter:
    """A `Converter` to one GGUF file."""

    file_format = "gguf"
    suffix = ".gguf"

    def describe_identity(self) -> dict[str, Any]:
        """See `Converter.identity`."""
        return {"converter": _CONVERTER, "gguf": version("gguf")}

    def is_needed(self, checkpoint: Checkpoint) -> bool:
        """See `Converter.wanted`: the engine reads nothing else."""
        return True

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """See `Converter.check`: a few architectures, three dtypes."""
        model_type = checkpoint.config.get("model_type")
        if model_type not in ARCHITECTURES:
            raise NotRunnableError(
                f"loading.engine=gguf converts models of type {', '.join(ARCHITECTURES)}: this one is {model_type}. "
                f"Use another loading method"
            )
        other = sorted({entry.dtype for entry in checkpoint.tensors} - _DTYPES.keys())
        if other:
            raise NotRunnableError(
                f"loading.engine=gguf keeps tensors of {', '.join(_DTYPES)}: this checkpoint has {', '.join(other)}. "
                f"Use another loading method"
            )

    def needed_bytes(self, checkpoint: Checkpoint) -> int:
        """See `Converter.needed_bytes`."""
        return checkpoint.weight_bytes + _ENTRY_BYTES * len(checkpoint.tensors) + _METADATA_BYTES

    def write_files(self, checkpoint: Checkpoint, folder: Path, on_progress: Callable[[int], None]) -> None:
        """See `Converter.write`; holds one tensor of the file at a time."""
        import numpy
        from gguf import GGMLQuantizationType, GGUFWriter

        config = checkpoint.config
        tensors = _in_file(checkpoint)
        writer = GGUFWriter(folder / f"model{self.suffix}", ARCHITECTURES[config["model_type"]])
        _describe(writer, config)
        for tensor in tensors:
            number, size = _DTYPES[tensor.entries[0].dtype]
            byte_count = sum(entry.end - entry.begin for entry in tensor.entries)
            kind = {"tensor_dtype": numpy.dtype(f"u{size}"), "raw_dtype": GGMLQuantizationType(number)}
            writer.add_tensor_info(tensor.name, tensor.shape, tensor_nbytes=byte_count, **kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for tensor in tensors:
            bits = _bits(checkpoint, tensor)
            writer.write_tensor_data(bits)
            on_progress(done := done + bits.nbytes)
        writer.close()


def _in_file(checkpoint: Checkpoint) -> list[_Tensor]:
    """Return the tensors of the file in the order of the checkpoint.

    Raises:
        CheckpointError: a tensor has no name in GGUF, or an expert is missing.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = checkpoint.config
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config["model_type"]])
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    found: dict[str, dict[int, TensorEntry]] = {}
    stacked: set[str] = set()
    for entry in checkpoint.tensors:
        expert = _EXPERT.fullmatch(entry.name)
        general = f"{expert[1]}.{expert[3]}.weight" if expert else entry.name
        name = names.get_name(general, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise CheckpointError(f"loading.engine=gguf: the tensor {entry.name} has no name in GGUF")
        found.setdefault(name, {})[int(expert[2]) if expert else 0] = entry
        if expert:
            stacked.add(name)
    tensors = [_Tensor(name, tuple(own[at] for at in sorted(own)), name in stacked) for name, own in found.items()]
    for tensor in tensors:
        alike = {(entry.dtype, entry.shape) for entry in tensor.entries}
        wanted = config["num_experts"] if tensor.stacked else 1
        if len(tensor.entries) != wanted or len(alike) > 1:
            raise CheckpointError(
                f"loading.engine=gguf: {tensor.name} needs {wanted} tensors of one shape and dtype, and the checkpoint "
                f"has {len(tensor.entries)} of {len(alike)} kinds. Fetch the checkpoint again"
            )
    return tensors


def _bits(checkpoint: Checkpoint, tensor: _Tensor) -> "NDArray[Any]":
    """Return the tensor as unsigned integers of its element size, in GGUF's layout."""
    import numpy

    size = _DTYPES[tensor.entries[0].dtype][1]
    bits = [read_tensor(checkpoint, entry).view(f"u{size}").reshape(entry.shape) for entry in tensor.entries]
    if tensor.stacked:
        return numpy.stack(bits)
    if checkpoint.config["model_type"] == "llama" and ".attn_q." in tensor.name:
        return _interleaved(bits[0], checkpoint.config["num_attention_heads"])
    if checkpoint.config["model_type"] == "llama" and ".attn_k." in tensor.name:
        return _interleaved(bits[0], _key_value_heads(checkpoint.config))
    return bits[0]


def _interleaved(rows: "NDArray[Any]", heads: int) -> "NDArray[Any]":
    """Interleave the two halves of each head's rows, as llama.cpp's rotary embedding has them."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _key_value_heads(config: dict[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _describe(writer: Any, config: dict[str, Any]) -> None:
    """Write the metadata that a reader needs to rebuild the model's config, as far as the checkpoint says it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    said = {
        writer.add_context_length: config.get("max_position_embeddings"),
        writer.add_embedding_length: config["hidden_size"],
        writer.add_block_count: config["num_hidden_layers"],
        writer.add_feed_forward_length: config.get("intermediate_size"),
        writer.add_head_count: config["num_attention_heads"],
        writer.add_head_count_kv: _key_value_heads(config),
        writer.add_key_length: head_dim,
        writer.add_value_length: head_dim,
        writer.add_rope_dimension_count: head_dim,
        writer.add_rope_freq_base: config.get("rope_theta", rope.get("rope_theta")),
        writer.add_layer_norm_rms_eps: config.get("rms_norm_eps"),
        writer.add_vocab_size: config["vocab_size"],
        writer.add_expert_count: config.get("num_experts"),
        writer.add_expert_used_count: config.get("num_experts_per_tok"),
        writer.add_expert_feed_forward_length: config.get("moe_intermediate_size"),
    }
    for add, value in said.items():
        if value is not None:
            add(value)
