"""Checkpoints of seeded random bits in the layout of a real architecture: what loading costs, without the download.

How long a load takes does not depend on what the weights say: bits with the right shapes, names and shards serve. The
values keep a forward pass finite: weights of magnitude 2^-11 to 2^-7, norms from 1 to 2, all of them exact in float16
too. They depend on seed, architecture and `_GENERATOR` alone, not on shards or on how many threads wrote them.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ladezeit.checkpoint.cache import Progress, Recipe, build_entry, find_entry
from ladezeit.config import SyntheticModel
from ladezeit.errors import ConfigError, did_you_mean
from ladezeit.system.limits import available_cpus

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Version of the bits: raise it when the same seed would give other values or files.
_GENERATOR = 1
#: Values that come from one seeding, in bf16 elements (1 MiB: stays in a core's second-level cache).
_CHUNK = 2**19
#: What a thread makes and writes in one go, in bf16 elements (4 MiB).
_BATCH = 2**21
#: A thread a processor makes values and writes them, two at least: one computes while the other waits for the disk.
_LEAST_THREADS, _MOST_THREADS = 2, 16

_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


# Which tensors an architecture's checkpoint has, under the names and in the order of the hub's checkpoints.


#: What a tensor's values must look like for the model to compute with finite numbers.
Role = Literal["weight", "norm", "bias"]

#: Which random bits of a bf16 (sign 1, exponent 8, fraction 7) are kept, and which are set.
_PATTERNS: dict[Role, tuple[int, int]] = {
    "weight": (0x81FF, 0x3A00),
    "bias": (0x81FF, 0x3A00),
    "norm": (0x007F, 0x3F80),
}


@dataclass(frozen=True)
class SyntheticSizes:
    """How large a checkpoint will be: bytes of its tensors, bytes of its shards, torch's name of its dtype."""

    weight_bytes: int
    file_bytes: int
    dtype: str = "bfloat16"
    file_format: str = "safetensors"


@dataclass(frozen=True)
class _RandomSlice:
    """Part of a tensor: `elements` values of its chunk number `chunk`; `tensor` is its place in the layout."""

    tensor: int
    role: Role
    chunk: int
    elements: int


@dataclass(frozen=True)
class _Shard:
    """One file to write: its header, and which tensors of the layout follow, in this order."""

    name: str
    header: bytes
    tensors: tuple[int, ...]


def locate_synthetic(model: SyntheticModel, cache: Path) -> Path | None:
    """Return the folder of `model` if it is in `cache`; changes nothing. Raises `ConfigError` as `prepare_synthetic`
    does.
    """
    return find_entry(cache, synthetic_recipe(model))


def prepare_synthetic(model: SyntheticModel, cache: Path, progress: Progress) -> Path:
    """Write the checkpoint of `model` into `cache` if it is not there yet, and return its folder.

    Raises:
        CheckpointError: the disk is too small or cannot be written.
        ConfigError: no layout is known for its architecture, or a size in it makes no sense.
    """
    return build_entry(cache, synthetic_recipe(model), lambda folder: _write(model, folder, progress), progress)


def synthetic_sizes(model: SyntheticModel) -> SyntheticSizes:
    """Return how large the checkpoint of `model` is or will be; nothing is written. Raises `ConfigError`."""
    specs = tensor_layout(model.architecture)
    data = sum(spec.byte_count for spec in specs)
    return SyntheticSizes(data, data + sum(len(shard.header) for shard in plan_shards(specs, model.shard_bytes)))


def synthetic_recipe(model: SyntheticModel) -> Recipe:
    """Return what the checkpoint of `model` is made from, and how many bytes it takes."""
    if model.seed < 0 or model.shard_bytes < 1:
        raise ConfigError(f"model.seed={model.seed} must be 0 or more, model.shard_bytes={model.shard_bytes} 1 or more")
    sizes = synthetic_sizes(model)
    return Recipe(
        name=model.name,
        kind="synthetic",
        identity={
            "generator": _GENERATOR,
            "seed": model.seed,
            "shard_bytes": model.shard_bytes,
            "config": config_json(model.architecture),
        },
        needed_bytes=sizes.file_bytes,
    )


def config_json(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return the content of config.json: `architecture`, with class and dtype where it leaves them out."""
    dtype = architecture.get("dtype") or architecture.get("torch_dtype") or "bfloat16"
    if dtype != "bfloat16":
        raise ConfigError(f"model.architecture has dtype {dtype}: synthetic ones are bfloat16. Use loading.dtype")
    default = {"architectures": [_CLASSES[str(architecture["model_type"])]], "dtype": "bfloat16"}
    if "torch_dtype" in architecture:
        del default["dtype"]
    return {**default, **architecture}


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


def plan_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[_Shard]:
    """Divide the tensors into files as `save_pretrained` does: in order, a new file where the next does not fit."""
    groups: list[list[int]] = [[]]
    used = 0
    for number, spec in enumerate(specs):
        if used + spec.byte_count > shard_bytes and groups[-1]:
            groups.append([])
            used = 0
        groups[-1].append(number)
        used += spec.byte_count
    shards = []
    for position, group in enumerate(groups, start=1):
        name = f"model-{position:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        group.sort(key=lambda number: specs[number].name)
        shards.append(_Shard(name, _header([specs[number] for number in group]), tuple(group)))
    return shards


def index_json(specs: Sequence[TensorSpec], shards: Sequence[_Shard]) -> str:
    """Return the content of model.safetensors.index.json, as `save_pretrained` formats it."""
    mapping = {specs[number].name: shard.name for shard in shards for number in shard.tensors}
    total = sum(spec.byte_count for spec in specs)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": mapping}, indent=2, sort_keys=True) + "\n"


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        end = position + spec.byte_count
        entries[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _write(model: SyntheticModel, folder: Path, progress: Progress) -> None:
    specs = tensor_layout(model.architecture)
    shards = plan_shards(specs, model.shard_bytes)
    total = sum(spec.byte_count for spec in specs)
    done = 0

    def told(written: int) -> None:
        nonlocal done
        done += written
        progress(f"writing {model.name}", done, total)

    threads = min(_MOST_THREADS, max(_LEAST_THREADS, available_cpus()))
    with ThreadPoolExecutor(threads, thread_name_prefix="synthetic") as pool:
        for shard in shards:
            with (folder / shard.name).open("wb", buffering=0) as file:
                _put(file.fileno(), 0, memoryview(shard.header))
                write = partial(_make_and_put, file.fileno(), model.seed)
                batches = _placed(_batches(specs, shard.tensors), len(shard.header))
                _write_values(pool, 2 * threads, write, batches, told)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(index_json(specs, shards), encoding="utf-8")
    _write_json(folder / "config.json", config_json(model.architecture))
    generation = {key: model.architecture.get(key) for key in ("bos_token_id", "eos_token_id")}
    _write_json(folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None})


def _write_values(
    pool: ThreadPoolExecutor,
    most: int,
    write: Callable[[int, list[_RandomSlice]], int],
    batches: Iterator[tuple[int, list[_RandomSlice]]],
    on_progress: Callable[[int], None],
) -> None:
    """Write the values of all batches, `most` of them on their way at once; `on_progress` gets the bytes of each when
    written.

    When this ends, whatever the reason, no thread writes any more.
    """
    waiting: deque[Future[int]] = deque()
    try:
        for begin, batch in batches:
            waiting.append(pool.submit(write, begin, batch))
            if len(waiting) >= most:
                on_progress(waiting.popleft().result())
        while waiting:
            on_progress(waiting.popleft().result())
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)  # the file is closed next, and its descriptor may then be another file's


def _placed(batches: Iterator[list[_RandomSlice]], begin: int) -> Iterator[tuple[int, list[_RandomSlice]]]:
    """Yield with each batch the byte of the file that it begins at, one behind the other from `begin` on."""
    for batch in batches:
        yield begin, batch
        begin += 2 * sum(piece.elements for piece in batch)


def _make_and_put(descriptor: int, seed: int, begin: int, batch: Sequence[_RandomSlice]) -> int:
    return _put(descriptor, begin, _values(seed, batch).data.cast("B"))


def _put(descriptor: int, begin: int, content: memoryview) -> int:
    """Write all of `content` at byte `begin` and return its length; a disk that fills up takes a part of it first."""
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], begin + written)
    return written


def _batches(specs: Sequence[TensorSpec], tensors: Sequence[int]) -> Iterator[list[_RandomSlice]]:
    """Gather pieces up to `_BATCH`: a mixture of experts has thousands of tensors too small to hand over one by one."""
    batch: list[_RandomSlice] = []
    held = 0
    for number in tensors:
        elements = specs[number].elements
        for chunk in range(-(-elements // _CHUNK)):
            piece = _RandomSlice(number, specs[number].role, chunk, min(_CHUNK, elements - chunk * _CHUNK))
            batch.append(piece)
            held += piece.elements
            if held >= _BATCH:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


def _values(seed: int, batch: Sequence[_RandomSlice]) -> "NDArray[np.uint16]":
    """Return the bits of all pieces, one behind the other, as bf16 in 16-bit words."""
    import numpy as np

    return np.concatenate([_chunk(seed, piece) for piece in batch])


def _chunk(seed: int, piece: _RandomSlice) -> "NDArray[np.uint16]":
    import numpy as np

    keep, put = _PATTERNS[piece.role]
    generator = np.random.PCG64DXSM(np.random.SeedSequence([seed, piece.tensor, piece.chunk]))
    words = generator.random_raw(-(-piece.elements // 4))
    words &= np.uint64(keep * 0x0001_0001_0001_0001)
    words |= np.uint64(put * 0x0001_0001_0001_0001)
    return words.astype("<u8", copy=False).view("<u2")[: piece.elements]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def tensor_layout(architecture: dict[str, Any]) -> list[TensorSpec]:
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
        self.tied = self.read_flag("tie_word_embeddings", False)

    def __call__(self, key: str) -> int:
        value = self.architecture.get(key)
        if type(value) is not int or value < 1:
            raise ConfigError(f"model.architecture.{key}={value} is needed as a positive whole number")
        return value

    def read_flag(self, key: str, default: bool) -> bool:
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
    biases = ("q_proj", "k_proj", "v_proj", "o_proj") if sizes.read_flag("attention_bias", False) else ()
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
