"""Snapshots of the Hugging Face hub: from the local cache where they are whole, else downloaded, before any clock.

Only what `from_pretrained` reads is fetched: the weights that the index names (safetensors where there are any),
configs, tokenizer and chat template.
"""

import contextlib
import errno
import fnmatch
import glob
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ladezeit.checkpoint import files
from ladezeit.checkpoint.cache import Progress
from ladezeit.checkpoint.files import read_object, shorten_value
from ladezeit.config import HubModel
from ladezeit.errors import CheckpointError

_SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_POLL_S = 0.5
_MOVE = "Free some, or set HF_HOME to a folder on a larger disk"


def locate_snapshot(model: HubModel) -> Path | None:
    """Return the snapshot's folder if config and all weights are in the local hub cache; no network, no changes."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model.repo_id, "config.json", revision=model.revision)
    except HFValidationError as cause:
        raise CheckpointError(f"model.repo_id={model.repo_id} is no name on the hub: {shorten_value(cause)}") from None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        files.find_weights(folder, read_object(folder / "config.json", constants=True))
    except CheckpointError:
        return None  # an interrupted download: to be completed
    return folder


def prepare_snapshot(model: HubModel, progress: Progress) -> Path:
    """Return the snapshot's folder, downloaded into the hub cache where it is not there whole.

    Raises:
        CheckpointError: no connection, offline mode, no such repository or revision, gated, no weights, or a full disk.
    """
    if there := locate_snapshot(model):
        return there
    try:
        return _download(model, progress)
    except CheckpointError:
        raise
    except Exception as cause:  # the hub's client raises whatever its HTTP library does, and that changes
        raise CheckpointError(f"model={model.name}: {_explain(model, cause)}") from cause


def _download(model: HubModel, progress: Progress) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(model.repo_id, revision=model.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if "/" not in file.rfilename}
    # The commit that was listed is the one to fetch, but under the name that was asked for: the cache keeps that name.
    wanted = _side_files(sizes, code=model.trust_remote_code) | _weights(model, set(sizes))
    missing = {name for name in wanted if not _is_cached(model, name)}
    total = sum(sizes.get(name, 0) for name in missing)
    blobs = _blobs(model.repo_id)
    _check_space(model, blobs, total)
    with _told(progress, f"downloading {model.repo_id}", blobs, total), _without_bars():
        patterns = sorted(glob.escape(name) for name in wanted)
        return Path(snapshot_download(model.repo_id, revision=model.revision, allow_patterns=patterns))


def _side_files(names: Any, *, code: bool) -> set[str]:
    patterns = (*_SIDE_FILES, "*.py") if code else _SIDE_FILES
    found = {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    return found - {files.INDEX["pickle"]}


def _weights(model: HubModel, names: set[str]) -> set[str]:
    """Return the files that hold the weights, as `weight_files.find` will look for them."""
    from huggingface_hub import hf_hub_download

    for file_format in ("safetensors", "pickle"):
        if files.SINGLE[file_format] in names:
            return {files.SINGLE[file_format]}
        index = files.INDEX[file_format]
        if index in names:
            path = hf_hub_download(model.repo_id, index, revision=model.revision)
            mapping = read_object(Path(path)).get("weight_map")
            if not isinstance(mapping, dict):
                raise CheckpointError(f"model={model.name}: {index} of {model.repo_id} is malformed: no weight_map")
            return {index, *map(str, mapping.values())}
    raise CheckpointError(
        f"model={model.name}: {model.repo_id} at {model.revision} has no weights that from_pretrained loads (neither "
        f"{files.SINGLE['safetensors']} nor an index). Give a repository that has them"
    )


def _explain(model: HubModel, cause: Exception) -> str:
    from huggingface_hub import constants, errors

    asked = f"{model.repo_id} at revision {model.revision}"
    match cause:
        case errors.GatedRepoError():
            return (
                f"{model.repo_id} is gated. Accept its terms at {constants.ENDPOINT}/{model.repo_id}, "
                f"then log in with: hf auth login"
            )
        case errors.RevisionNotFoundError():
            return f"{model.repo_id} has no revision '{model.revision}'. Give one of its commits, or main"
        case errors.RepositoryNotFoundError():
            return f"{model.repo_id} is not on the hub, or private. Check model.repo_id, or log in with: hf auth login"
        case errors.OfflineModeIsEnabled():
            return f"{asked} is not whole in the local cache, and HF_HUB_OFFLINE forbids to fetch it. Unset it once"
        case OSError(errno=errno.ENOSPC):
            return f"the disk of {constants.HF_HUB_CACHE} is full. {_MOVE}"
    reason = f"{type(cause).__name__}: {shorten_value(cause, 300)}"
    return (
        f"{asked} is not whole in the local cache and could not be fetched from {constants.ENDPOINT} ({reason}). Check "
        f"the connection, or load a local copy with model=folder model.path=…"
    )


def _is_cached(model: HubModel, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model.repo_id, name, revision=model.revision), str)


def _blobs(repo_id: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "blobs"


def _bytes_in(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):  # renamed from .incomplete meanwhile
                total += path.stat().st_blocks * 512
    return total


def _check_space(model: HubModel, blobs: Path, needed_bytes: int) -> None:
    import shutil

    there = next(folder for folder in (blobs, *blobs.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise CheckpointError(
            f"model={model.name}: {model.repo_id} needs {needed_bytes} more bytes ({needed_bytes / 1e9:.2f} GB) in "
            f"{there}, where {free} bytes ({free / 1e9:.2f} GB) are free. {_MOVE}"
        )


@contextlib.contextmanager
def _told(progress: Progress, what: str, blobs: Path, total: int) -> Iterator[None]:
    """Tell `progress` the bytes that have arrived, as the disk shows: the client's reporting changes by version."""
    ended = threading.Event()
    before = _bytes_in(blobs)

    def tell() -> None:
        while not ended.wait(_POLL_S):
            progress(what, min(_bytes_in(blobs) - before, total), total)

    progress(what, 0, total)
    thread = threading.Thread(target=tell, name="download progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    progress(what, total, total)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    from huggingface_hub import utils

    bars: Any = utils
    shown = not bars.are_progress_bars_disabled()
    if shown:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bars()
