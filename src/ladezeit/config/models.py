"""The typed schema of the group `model`: where a checkpoint comes from."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


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
