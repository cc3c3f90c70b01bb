"""The typed schema of one whole configuration and of its groups; of `loading` what all engines share."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING

#: Keys of `RunConfig` that do not change what is measured: two configs that differ only here are the same point.
NOT_MEASURED = ("sample", "tracking", "order_seed", "discard_first", "ceilings", "outputs", "title", "smaller_model")


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


# The typed schema of the groups `loading` and `model`: what each engine's own arguments start from, and where a
# checkpoint comes from.


class DType(Enum):
    """Element type of the loaded weights; `auto` keeps the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@dataclass
class LoadingConfig:
    """What all loading methods share; `engine` names the code that loads."""

    name: str = MISSING
    engine: str = MISSING
    dtype: DType = DType.auto
    disable_cpu_offload: bool = True

    @property
    def process_count(self) -> int:
        """How many processes a load is; several share the GPUs from cuda:0 on, where there are any."""
        return 1

    @property
    def item_bytes(self) -> float | None:
        """Bytes that an element of a weight takes at least, where the load quantizes; None where `dtype` tells."""
        return None

    def check_arguments(self) -> None:
        """Refuse arguments that do not go together, or that would have no effect; raises `CombinationError`."""

    def check_run(self, run: "RunConfig") -> None:
        """Refuse ways of measuring that do not go with this load; raises `CombinationError`."""

    def check_model(self, model: dict[str, Any]) -> None:
        """Refuse a model (its config.json) that cannot be loaded so; raises `CombinationError`."""

    def check_machine(self) -> None:
        """Refuse arguments that name what this machine does not have; raises `ConfigError` or `NotRunnableError`."""


@dataclass
class ModelConfig:
    """What all kinds of `model` share."""

    name: str = MISSING
    trust_remote_code: bool = False


@dataclass
class LoadConfig:
    """What is loaded, how, onto which device, and what is checked of it: all that a service's load needs."""

    model: ModelConfig = MISSING
    loading: LoadingConfig = MISSING
    validation: ValidationConfig = MISSING
    runtime: RuntimeConfig = MISSING
    device: str = MISSING


@dataclass
class RunConfig(LoadConfig):
    """One composed configuration: a load, and how a sample measures it."""

    cache: CacheConfig = MISSING
    inference: InferenceConfig = MISSING
    process: ProcessConfig = MISSING
    tracking: TrackingConfig = MISSING
    sample: int = MISSING
    phases: bool = MISSING
    order_seed: int = MISSING
    discard_first: bool = MISSING
    outputs: str = MISSING
    title: Optional[str] = None
    smaller_model: Optional[str] = None
    ceilings: Optional[bool] = None
    profile: bool = False


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
