"""The typed schema of every option group, and the one place that turns composed config into objects.

The option files in ``conf/`` start from these classes (``defaults: [/schema/<group>/<kind>@_here_]``), so Hydra checks
names and types while it composes. `build` then checks values; `combination` looks at them together. Enum
members are lower case because their names are what users type.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, Optional
from urllib.parse import urlsplit

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from ladezeit.errors import ConfigError, did_you_mean


class DType(Enum):
    """Element type of the loaded weights; `auto` keeps the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class CacheState(Enum):
    """State of the page cache for the files that the engine reads, when the load starts."""

    cold = "cold"
    warm = "warm"
    half = "half"
    as_is = "as_is"


class ProcessKind(Enum):
    """What a sample's process has done before its clock starts."""

    fresh = "fresh"
    prewarmed = "prewarmed"
    inline = "inline"


class ValidationLevel(Enum):
    """What is looked at after a load."""

    none = "none"
    sampled = "sampled"
    all_modules = "all_modules"
    origin_rule = "origin_rule"
    placement = "placement"
    content = "content"
    logits = "logits"
    full = "full"


class FourBitType(Enum):
    """Code book of bitsandbytes' 4 bit: `nf4` for normally distributed weights, `fp4` for small floats."""

    nf4 = "nf4"
    fp4 = "fp4"


class TrackingKind(Enum):
    """Where runs are logged to."""

    sqlite = "sqlite"
    server = "server"
    none = "none"


class MatmulPrecision(Enum):
    """Precision of float32 matrix products, as `torch.set_float32_matmul_precision` takes it."""

    highest = "highest"
    high = "high"
    medium = "medium"


@dataclass
class ModelConfig:
    """What all kinds of `model` share."""

    name: str = MISSING
    trust_remote_code: bool = False


@dataclass
class HubModel(ModelConfig):
    """A snapshot on the Hugging Face hub, pinned by its revision; downloaded before any clock starts."""

    repo_id: str = MISSING
    revision: str = MISSING


@dataclass
class FolderModel(ModelConfig):
    """A local checkpoint folder: config.json, safetensors shards, and an index where there are several."""

    path: str = MISSING


@dataclass
class PackagedModel(ModelConfig):
    """A GGUF model inside an installed Python package, converted once to a safetensors checkpoint."""

    package: str = MISSING
    file: str = MISSING
    install: str = MISSING


@dataclass
class SyntheticModel(ModelConfig):
    """A checkpoint of seeded random bits in the real layout of an architecture.

    `architecture` becomes the checkpoint's config.json; `shard_bytes` bounds a shard.
    """

    architecture: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    shard_bytes: int = 4 * 1000**3


@dataclass
class LoadingConfig:
    """What all loading methods share; `engine` names the code that loads."""

    name: str = MISSING
    engine: str = MISSING
    dtype: DType = DType.auto
    disable_cpu_offload: bool = True


@dataclass
class TransformersLoading(LoadingConfig):
    """Arguments of a load through `from_pretrained`.

    `device_map` is None, a strategy (`auto`, `balanced`, `balanced_low_0`, `sequential`), a device, or a mapping from
    module to `device`, `cpu`, `disk`, `cuda:N` or a GPU's number; the word `device` stands for the run's device.
    `max_memory` maps `device`, `cpu` or a GPU's number to a size (`20GiB`) or a share of what that device has (`90%`);
    empty means no limit, and only a strategy takes any. With `disable_cpu_offload` a module on the disk, or in host
    memory on a GPU run, is an error; without it disk offload goes to a folder of the sample's own, in `offload_folder`
    where that is given, and is removed after the sample. `async_load` (the loader's threads) and `disable_mmap` (whole
    files read into memory) are the library's choice where they are None.
    """

    engine: str = "transformers"
    device_map: Any = None
    max_memory: dict[str, str] = field(default_factory=dict)
    offload_folder: Optional[str] = None
    move_to_device: bool = False
    async_load: Optional[bool] = None
    disable_mmap: Optional[bool] = None


@dataclass
class AccelerateLoading(TransformersLoading):
    """Arguments of a load through `accelerate.load_checkpoint_and_dispatch`, which needs a `device_map`."""

    engine: str = "accelerate"
    device_map: Any = "device"


@dataclass
class LegacyManagerLoading(TransformersLoading):
    """The origin case's manager as it was before: no rule is enforced, every module is walked after the load."""

    engine: str = "legacy_manager"
    settings_reads: int = 2


@dataclass
class QuantisedLoading(TransformersLoading):
    """A load that quantises on its way; the library may choose a device of its own where no `device_map` is given."""

    device_map: Any = "device"


@dataclass
class Bitsandbytes8bitLoading(QuantisedLoading):
    """bitsandbytes' LLM.int8(): where an input is beyond `threshold`, its column is computed in float; 0 for none."""

    engine: str = "bitsandbytes_8bit"
    threshold: float = 6.0


@dataclass
class Bitsandbytes4bitLoading(QuantisedLoading):
    """bitsandbytes' 4 bit in blocks of 64; `double_quant` quantises the blocks' scales too."""

    engine: str = "bitsandbytes_4bit"
    quant_type: FourBitType = FourBitType.nf4
    double_quant: bool = False


@dataclass
class TorchaoInt8Loading(QuantisedLoading):
    """torchao's symmetric int8 weights with a scale a row; activations stay as they are."""

    engine: str = "torchao_int8"


@dataclass
class TensorParallelLoading(LoadingConfig):
    """Arguments of a load over several processes: each of `ranks` holds its share of every split weight."""

    engine: str = "tensor_parallel"
    ranks: int = 2


@dataclass
class TensorLoading(LoadingConfig):
    """Arguments of an engine that yields tensors on the run's one device; `threads` None leaves its own choice."""

    threads: Optional[int] = None


@dataclass
class FastsafetensorsLoading(TensorLoading):
    """Arguments of fastsafetensors; `direct` forces O_DIRECT on or off, `buffer_bytes` sizes its bounce buffers."""

    engine: str = "fastsafetensors"
    direct: Optional[bool] = None
    buffer_bytes: Optional[int] = None


@dataclass
class RunaiLoading(TensorLoading):
    """Arguments of the Run:ai Model Streamer; `buffer_bytes` bounds its ring of host buffers."""

    engine: str = "runai_streamer"
    buffer_bytes: Optional[int] = None


@dataclass
class InstanttensorLoading(TensorLoading):
    """Arguments of InstantTensor; `io_depth` is how many reads are in flight, `threads` counts where it uses any."""

    engine: str = "instanttensor"
    io_depth: Optional[int] = None


class Reading(Enum):
    """How our own reader gets at bytes: each part by whether it is in the page cache, or all alike."""

    by_residency = "by_residency"
    direct = "direct"
    buffered = "buffered"
    mapped = "mapped"


@dataclass
class TensorizerLoading(TensorLoading):
    """Arguments of tensorizer; `threads` read, `verify_hash` compares every tensor with the hashes in its file."""

    engine: str = "tensorizer"
    verify_hash: bool = False


@dataclass
class GgufLoading(LoadingConfig):
    """Arguments of a load through `from_pretrained` from a GGUF file, onto the run's one device."""

    engine: str = "gguf"


@dataclass
class StreamedLoading(TensorLoading):
    """Arguments of our own reader.

    `extent_bytes` is the most that is read at once, a multiple of a page; `ring_bytes` bounds the pinned host memory on
    the way to a GPU. `reading` other than `by_residency` is there to be compared with it.
    """

    engine: str = "streamed"
    extent_bytes: int = 8 * 2**20
    ring_bytes: int = 256 * 2**20
    reading: Reading = Reading.by_residency


@dataclass
class AutoLoading(LoadingConfig):
    """No arguments: engine and arguments are chosen by what is found (see `ladezeit.loading.auto`)."""

    engine: str = "auto"


#: The schema of each engine's arguments, by the name in `engine`. A user's own engine takes those of `transformers`.
LOADINGS: dict[str, type[LoadingConfig]] = {
    "auto": AutoLoading,
    "transformers": TransformersLoading,
    "legacy_manager": LegacyManagerLoading,
    "tensor_parallel": TensorParallelLoading,
    "streamed": StreamedLoading,
    "accelerate": AccelerateLoading,
    "bitsandbytes_8bit": Bitsandbytes8bitLoading,
    "bitsandbytes_4bit": Bitsandbytes4bitLoading,
    "torchao_int8": TorchaoInt8Loading,
    "safetensors_mmap": TensorLoading,
    "safetensors_pread": TensorLoading,
    "safetensors_prefetch": TensorLoading,
    "fastsafetensors": FastsafetensorsLoading,
    "fastsafetensors_gds": FastsafetensorsLoading,
    "runai_streamer": RunaiLoading,
    "instanttensor": InstanttensorLoading,
    "instanttensor_buffered": InstanttensorLoading,
    "tensorizer": TensorizerLoading,
    "gguf": GgufLoading,
    "torch_dcp": TensorLoading,
}


@dataclass
class ValidationConfig:
    """What is looked at after the load; `k` bounds the modules that `sampled` takes from each end."""

    level: ValidationLevel = MISSING
    k: int = 10


@dataclass
class CacheConfig:
    """The page-cache state to set and verify before the load."""

    state: CacheState = MISSING


@dataclass
class InferenceConfig:
    """Greedy continuation after the load: `new_tokens` of them, 0 for none at all.

    `prompt` is used where the checkpoint has a tokenizer (through its chat template where `chat` is set), `token_ids`
    otherwise.
    """

    new_tokens: int = MISSING
    prompt: str = ""
    chat: bool = True
    token_ids: list[int] = field(default_factory=list)


@dataclass
class RuntimeConfig:
    """Process-wide performance settings; None leaves the library's default. Read once, applied once."""

    attn_implementation: Optional[str] = None
    matmul_precision: Optional[MatmulPrecision] = None
    allow_tf32: Optional[bool] = None
    cudnn_benchmark: Optional[bool] = None
    threads: Optional[int] = None
    allocator: Optional[str] = None


@dataclass
class ProcessConfig:
    """How a sample's process comes to be and how long it may take."""

    kind: ProcessKind = MISSING
    time_limit_s: float = 600.0


@dataclass
class TrackingConfig:
    """Where runs are logged; `uri` of `sqlite` is derived from the outputs folder where it is not given."""

    kind: TrackingKind = MISSING
    uri: Optional[str] = None
    experiment: str = "ladezeit"


@dataclass
class RunConfig:
    """One composed point: everything a sample needs to be measured."""

    model: ModelConfig = MISSING
    loading: LoadingConfig = MISSING
    validation: ValidationConfig = MISSING
    cache: CacheConfig = MISSING
    inference: InferenceConfig = MISSING
    runtime: RuntimeConfig = MISSING
    process: ProcessConfig = MISSING
    tracking: TrackingConfig = MISSING
    device: str = MISSING
    sample: int = MISSING
    phases: bool = MISSING
    order_seed: int = MISSING
    discard_first: bool = MISSING
    outputs: str = MISSING
    title: Optional[str] = None
    smaller_model: Optional[str] = None
    ceilings: Optional[bool] = None


#: Keys of `RunConfig` that do not change what is measured: two configs that differ only here are the same point.
NOT_MEASURED = ("sample", "tracking", "order_seed", "discard_first", "ceilings", "outputs", "title", "smaller_model")

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def register() -> None:
    """Store the schemas where option files find them; under ``schema/`` so that `glob(*)` of a group never sees one."""
    store = ConfigStore.instance().store
    store(name="run", group="schema", node=RunConfig)
    kinds: dict[str, dict[str, type]] = {
        "model": {
            "hub": HubModel,
            "folder": FolderModel,
            "packaged": PackagedModel,
            "synthetic": SyntheticModel,
        },
        "loading": dict(LOADINGS),
        "validation": {"base": ValidationConfig},
        "cache": {"base": CacheConfig},
        "inference": {"base": InferenceConfig},
        "runtime": {"base": RuntimeConfig},
        "process": {"base": ProcessConfig},
        "tracking": {"base": TrackingConfig},
    }
    for group, nodes in kinds.items():
        for name, node in nodes.items():
            store(name=name, group=f"schema/{group}", node=node)


def build(composed: DictConfig) -> RunConfig:
    """Turn a composed config into objects and check each value; `combination.check_combination` looks at them together.

    Raises:
        ConfigError: a key is unknown, or a value is out of its range.
        omegaconf.errors.OmegaConfBaseException: a mandatory value is missing or an interpolation fails.
    """
    _check_keys(composed, "")
    config = OmegaConf.to_object(composed)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            "the composed config is not a ladezeit run: its first default must be '/schema/run' (see conf/config.yaml)"
        )
    _check_device(config.device)
    _check_numbers(config)
    _check_no_secret(config.tracking)
    return config


def _check_keys(node: DictConfig, path: str) -> None:
    """Refuse keys that were added with ``+`` where no schema knows them: they would change nothing."""
    kind = OmegaConf.get_type(node)
    if not is_dataclass(kind):
        return
    known = [item.name for item in fields(kind)]
    for key in map(str, node):
        if key not in known:
            raise ConfigError(
                f"'{path}{key}' is no key of the config: there are {', '.join(known)}." + did_you_mean(key, known)
            )
        if (
            not OmegaConf.is_missing(node, key)
            and not OmegaConf.is_interpolation(node, key)
            and OmegaConf.is_dict(node[key])
        ):
            _check_keys(node[key], f"{path}{key}.")


def to_plain(config: RunConfig) -> dict[str, Any]:
    """Return `config` as plain dicts, lists, strings and numbers (enums by name), ready for JSON."""
    plain = _plain(config)
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


def from_plain(plain: dict[str, Any]) -> RunConfig:
    """Rebuild the objects that `to_plain` flattened; the worker's way to its config."""
    groups = {
        "model": _model_class(plain["model"]),
        "loading": _loading_class(plain["loading"]),
    }
    node = OmegaConf.structured(RunConfig)
    for key, cls in groups.items():
        node[key] = OmegaConf.structured(cls)
    config = OmegaConf.to_object(OmegaConf.merge(node, plain))
    assert isinstance(config, RunConfig)
    return config


def _loading_class(plain: dict[str, Any]) -> type[LoadingConfig]:
    """Return an engine's schema; that of a user's own engine is the one whose arguments it was given."""
    if plain["engine"] in LOADINGS:
        return LOADINGS[plain["engine"]]
    fitting = (cls for cls in LOADINGS.values() if set(cls.__dataclass_fields__) == set(plain))
    return next(fitting, TransformersLoading)


def _model_class(plain: dict[str, Any]) -> type[ModelConfig]:
    for cls in (HubModel, FolderModel, PackagedModel, SyntheticModel):
        if set(cls.__dataclass_fields__) == set(plain):
            return cls
    raise ConfigError(f"model has the keys {sorted(plain)}, which fit no kind of model")


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind == "cuda" and (index.isdigit() or (not index and device == "cuda")):
        return
    if device in ("auto", "cpu"):
        return
    raise ConfigError(
        f"device={device} is not a device: use auto, cpu, cuda or cuda:N."
        + did_you_mean(device, ("auto", "cpu", "cuda", "cuda:0"))
    )


def _check_no_secret(tracking: TrackingConfig) -> None:
    if urlsplit(tracking.uri or "").password:
        raise ConfigError(
            "tracking.uri holds a password, and configs are written into results and logs: leave tracking.uri out and "
            "set MLFLOW_TRACKING_URI in the environment instead"
        )


def _check_numbers(config: RunConfig) -> None:
    limits = {
        "sample": (config.sample, 0),
        "validation.k": (config.validation.k, 1),
        "inference.new_tokens": (config.inference.new_tokens, 0),
        "runtime.threads": (config.runtime.threads, 1),
        "process.time_limit_s": (config.process.time_limit_s, 1),
        "loading.ranks": (getattr(config.loading, "ranks", None), 2),
        "loading.threads": (getattr(config.loading, "threads", None), 1),
        "loading.io_depth": (getattr(config.loading, "io_depth", None), 1),
        "loading.threshold": (getattr(config.loading, "threshold", None), 0),
        "loading.buffer_bytes": (getattr(config.loading, "buffer_bytes", None), 4096),
    }
    for key, (value, least) in limits.items():
        if value is not None and value < least:
            raise ConfigError(f"{key}={value} is too small: the least is {least}")
