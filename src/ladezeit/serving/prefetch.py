"""`prefetch` and `evict`: a model's files brought into the page cache before somebody waits for them, and out again."""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.cache import Progress
from ladezeit.checkpoint.resolve import Checkpoint, inspect_checkpoint, locate_checkpoint, prepare_checkpoint
from ladezeit.config import LoadingConfig, ModelConfig
from ladezeit.errors import CheckpointError, ConfigError
from ladezeit.loading.conversion import conversion_for
from ladezeit.loading.preflight import TooLittleMemoryError
from ladezeit.serving.request import loading_of, model_of
from ladezeit.system.files import cache_folder
from ladezeit.system.limits import available_memory_bytes
from ladezeit.system.page_cache import COLD_BELOW, WARM_ABOVE, drop_pages, resident_share
from ladezeit.system.prefetch import missing_ranges, read_ranges

_READS = 3


@dataclass(frozen=True)
class Residency:
    """How much of a model's files is in the page cache.

    Shares count pages, 0.0 to 1.0, before and after what was asked; NaN where the system does not tell us. `read_bytes`
    were read for it, in `seconds`.
    """

    model: str
    files: tuple[Path, ...]
    file_bytes: int
    before_share: float
    after_share: float
    read_bytes: int = 0
    seconds: float = 0.0

    @property
    def is_warm(self) -> bool:
        """Whether all of it is in memory, but for what the system takes and gives any moment."""
        return self.after_share > WARM_ABOVE

    @property
    def is_cold(self) -> bool:
        """Whether none of it is in memory, but for what a look at the headers brings in."""
        return self.after_share < COLD_BELOW


def prefetch(
    model: str | os.PathLike[str] | ModelConfig,
    *,
    rate: float | None = None,
    loading: str | Mapping[str, Any] | LoadingConfig | None = None,
    progress: Progress | None = None,
    config_dir: str | os.PathLike[str] | None = None,
) -> Residency:
    """Bring a model's files into the page cache, fetched or converted first where they are not on this machine.

    Only what is not there yet is read. It must fit into the memory that is available: what nobody uses, and what the
    kernel holds for other files, which make room for these; within the limits of this process's control groups.

    Args:
        model: as for `load`.
        rate: the most bytes read in a second, so that the disk has time for others; None for no limit.
        loading: the method that will load it: of one with a format of its own the converted files are meant.
        progress: told what is being done, bytes done and bytes in all.
        config_dir: as for `load`.

    Raises:
        ConfigError: a name means nothing, or the rate is not positive.
        CheckpointError: the checkpoint cannot be had or read.
        NotRunnableError: it does not fit into memory; nothing was read.
    """
    if rate is not None and not rate > 0:
        raise ConfigError(f"rate={rate} bytes per second would never end: give a positive rate, or None for no limit")
    own = _folder(config_dir)
    config = model_of(model, own)
    told = progress or (lambda what, done, total: None)
    files = _files(prepare_checkpoint(config, cache_folder(), told), config, loading, own, told)
    started = time.monotonic()
    before = resident_share(files)
    _check_memory(config.name, int(_bytes_of(files) * (1 if math.isnan(before) else 1 - before)))
    read_bytes = 0
    for _ in range(_READS):  # the system may take some pages back while the others are being read
        missing = missing_ranges(files)
        read_bytes += read_ranges(missing, rate, lambda done, total: told(f"reading {config.name}", done, total))
        after = resident_share(files)
        if not after < WARM_ABOVE:
            break
    return Residency(config.name, files, _bytes_of(files), before, after, read_bytes, time.monotonic() - started)


def evict(
    model: str | os.PathLike[str] | ModelConfig,
    *,
    loading: str | Mapping[str, Any] | LoadingConfig | None = None,
    config_dir: str | os.PathLike[str] | None = None,
) -> Residency:
    """Let go of a model's files in the page cache; what a process has mapped stays, and the answer says so.

    Args and errors are those of `prefetch`; a model that is not on this machine is a `CheckpointError`.
    """
    config, files = _there(model, loading, config_dir)
    started = time.monotonic()
    before = resident_share(files)
    drop_pages(files)
    after = resident_share(files)
    return Residency(config.name, files, _bytes_of(files), before, after, seconds=time.monotonic() - started)


def measure_residency(
    model: str | os.PathLike[str] | ModelConfig,
    *,
    loading: str | Mapping[str, Any] | LoadingConfig | None = None,
    config_dir: str | os.PathLike[str] | None = None,
) -> Residency:
    """Return how much of a model's files is in the page cache; reads nothing of the weights. See `evict`."""
    config, files = _there(model, loading, config_dir)
    share = resident_share(files)
    return Residency(config.name, files, _bytes_of(files), share, share)


def _there(
    model: str | os.PathLike[str] | ModelConfig,
    loading: str | Mapping[str, Any] | LoadingConfig | None,
    config_dir: str | os.PathLike[str] | None,
) -> tuple[ModelConfig, tuple[Path, ...]]:
    own = _folder(config_dir)
    config = model_of(model, own)
    folder = locate_checkpoint(config, cache_folder())
    if folder is None:
        raise CheckpointError(f"model={config.name} is not on this machine, so nothing of it is in memory")
    return config, _files(inspect_checkpoint(folder, config.name), config, loading, own, lambda what, done, total: None)


def _files(
    checkpoint: Checkpoint,
    model: ModelConfig,
    loading: str | Mapping[str, Any] | LoadingConfig | None,
    config_dir: Path | None,
    on_progress: Progress,
) -> tuple[Path, ...]:
    """Return the files that the method reads: the shards, or what they were converted to."""
    if loading is None:
        return checkpoint.shards
    engine = loading_of(loading, config_dir).engine
    converted = conversion_for(engine, checkpoint, model.name, cache_folder(), on_progress)
    return checkpoint.shards if converted is None else converted.files


def _folder(config_dir: str | os.PathLike[str] | None) -> Path | None:
    return Path(config_dir).expanduser() if config_dir is not None else None


def _check_memory(name: str, needed: int) -> None:
    available = available_memory_bytes()
    if needed > available:
        raise TooLittleMemoryError(
            f"{name}: {needed / 2**30:.2f} GiB are not in the page cache, and {available / 2**30:.2f} GiB of memory "
            f"are available: it would push itself out again. Nothing was read: end what uses memory, or load it cold"
        )


def _bytes_of(files: tuple[Path, ...]) -> int:
    return sum(path.stat().st_size for path in files)
