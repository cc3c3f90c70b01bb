"""Which samples a sweep has, in which order, and which of them this machine can run."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ladezeit.config import (
    NOT_MEASURED,
    Bitsandbytes4bitLoading,
    CacheState,
    DType,
    LoadingConfig,
    QuantisedLoading,
    RunConfig,
    TensorParallelLoading,
    TracedLoading,
    TransformersLoading,
    to_plain,
)
from ladezeit.errors import LadezeitError, NotRunnableError
from ladezeit.loading import registry
from ladezeit.loading.placement import single_device
from ladezeit.measure.devices import ResolvedDevice
from ladezeit.measure.limits import available_memory_bytes
from ladezeit.measure.profiler import check_installed
from ladezeit.placement_rules import check_on_machine

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

#: What an element takes at least once it is quantised: 4 bit and a float32 scale for 64 of them, a byte of the scale
#: for as many where the scales are quantised too; 8 bit and a scale a row, which is next to nothing.
_FOUR_BIT_BYTES = 0.5 + 4 / 64
_DOUBLE_FOUR_BIT_BYTES = 0.5 + 1 / 64
_EIGHT_BIT_BYTES = 1.0

#: What a worker needs besides the weights: interpreter, libraries, activations.
_WORKER_BYTES = 1.5 * 2**30


class Sizes(Protocol):
    """How large a checkpoint is: bytes of its tensors, bytes of its shards, torch's name of its dtype, its format."""

    @property
    def weight_bytes(self) -> int: ...  # noqa: D102

    @property
    def file_bytes(self) -> int: ...  # noqa: D102

    @property
    def dtype(self) -> str: ...  # noqa: D102

    @property
    def file_format(self) -> str: ...  # noqa: D102


class TooLittleMemoryError(NotRunnableError):
    """Host or device memory is smaller than what the point needs."""


@dataclass(frozen=True)
class Job:
    """One sample of a sweep: the overrides that compose it, what they compose to, why it cannot run here if so."""

    overrides: list[str]
    config: RunConfig
    refusal: LadezeitError | None = None


def point_id(config: RunConfig) -> str:
    """Return 12 hexadecimal digits that are equal for configs that measure the same thing."""
    measured = {key: value for key, value in to_plain(config).items() if key not in NOT_MEASURED}
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:12]


def in_blocks(jobs: Sequence[Job], seed: int) -> list[Job]:
    """Order `jobs` in one block a sample number, shuffled inside each block by `seed`.

    Whatever drifts while a sweep runs (clocks, temperature, a neighbour) then meets every point alike.
    """
    blocks: dict[int, list[Job]] = {}
    for job in jobs:
        blocks.setdefault(job.config.sample, []).append(job)
    ordered = []
    for sample in sorted(blocks):
        block = blocks[sample]
        random.Random(f"{seed}/{sample}").shuffle(block)
        ordered += block
    return ordered


def varying_keys(jobs: Sequence[Job]) -> list[str]:
    """Return the override keys that have several values over `jobs`: cache and loading first, the sample last."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for override in job.overrides:
            key, _, value = override.partition("=")
            values.setdefault(key.lstrip("+~"), set()).add(value)
    keys = [key for key, found in values.items() if len(found) > 1 and not key.startswith("hydra.")]
    first = {"model": 0, "cache": 1, "loading": 2, "sample": 9}
    return sorted(keys, key=lambda key: first.get(key, 5))


def weights_bytes(loading: LoadingConfig, checkpoint_bytes: int, checkpoint_dtype: str) -> int:
    """Return the bytes of the weights in memory: those on disk, scaled by the dtype that was asked for.

    For a quantised load they are the least it can need, as if it kept nothing: how much it keeps (the head, embeddings)
    is known only once the model is there. On the way one tensor at a time is there in full.
    """
    if isinstance(loading, QuantisedLoading):
        return int(checkpoint_bytes * _quantised_item_bytes(loading) / _ITEM_BYTES.get(checkpoint_dtype, 2))
    if loading.dtype is DType.auto:
        return checkpoint_bytes
    return checkpoint_bytes * _ITEM_BYTES[loading.dtype.value] // _ITEM_BYTES.get(checkpoint_dtype, 2)


def _quantised_item_bytes(loading: QuantisedLoading) -> float:
    if not isinstance(loading, Bitsandbytes4bitLoading):
        return _EIGHT_BIT_BYTES
    return _DOUBLE_FOUR_BIT_BYTES if loading.double_quant else _FOUR_BIT_BYTES


def converts(loading: LoadingConfig, checkpoint_dtype: str) -> bool:
    """Return whether the weights in memory are other than those on disk, so that mapping the file is not enough."""
    changed = loading.dtype is not DType.auto and loading.dtype.value != checkpoint_dtype
    return changed or isinstance(loading, QuantisedLoading)


def host_bytes_needed(config: RunConfig, on_gpu: bool, checkpoint: Sizes) -> int:
    """Return the host memory that a sample needs at its peak, without what the kernel can take back."""
    loading = config.loading
    changed = converts(loading, checkpoint.dtype)
    own = weights_bytes(loading, checkpoint.weight_bytes, checkpoint.dtype) if changed else 0
    if on_gpu and not (isinstance(loading, TransformersLoading) and loading.move_to_device):
        own = 0
    cached = checkpoint.file_bytes if config.cache.state is CacheState.warm else 0
    return int(own + cached + _WORKER_BYTES * ranks_of(loading))


def ranks_of(loading: LoadingConfig) -> int:
    """Return how many processes a sample is."""
    return loading.ranks if isinstance(loading, TensorParallelLoading) else 1


def check_runnable(config: RunConfig, device: ResolvedDevice, checkpoint: Sizes) -> None:
    """Check that this machine can run the point, before anything is read.

    Raises:
        ConfigError: there is no such engine.
        NotRunnableError: a profile was asked for and the profiler is not installed.
        CombinationError, NotRunnableError: the placement does not go with the device, or names GPUs that are not there.
        TooLittleMemoryError: naming what is needed and what there is.
    """
    loading = config.loading
    if config.profile:
        check_installed()
    registry.check(loading.engine, device.name, checkpoint.file_format)
    if isinstance(loading, TracedLoading) and loading.function is not None:
        registry.check_module("loading.function", loading.function)
    check_on_machine(loading, device)
    needed = host_bytes_needed(config, device.gpu is not None, checkpoint)
    available = available_memory_bytes()
    if needed > available:
        raise TooLittleMemoryError(
            f"{config.model.name} by {loading.name} with cache={config.cache.state.value} needs "
            f"{needed / 2**30:.1f} GiB of host memory, {available / 2**30:.1f} GiB are available: take a smaller "
            f"model, cache=cold, or loading.dtype=auto, which keeps the checkpoint's own"
        )
    weights = weights_bytes(loading, checkpoint.weight_bytes, checkpoint.dtype) / ranks_of(loading)
    if device.gpu is not None and single_device(loading) and weights > device.gpu.total_bytes > 0:
        raise TooLittleMemoryError(
            f"{config.model.name} by {loading.name} needs {weights / 2**30:.1f} GiB on {device.gpu.name}, which has "
            f"{device.gpu.total_bytes / 2**30:.1f} GiB: take a smaller dtype, or a placement over several devices"
        )
