"""From ``model=…`` to a checkpoint on disk whose every file was looked at: `locate_checkpoint`, `prepare_checkpoint`
and `inspect_checkpoint`.

Nothing here imports torch or transformers: the supervisor runs it before any clock starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ladezeit.checkpoint import files as weight_files
from ladezeit.checkpoint import hub, packaged, pickle_scan, synthetic
from ladezeit.checkpoint.cache import Progress
from ladezeit.checkpoint.dtypes import MODEL_DTYPES
from ladezeit.checkpoint.files import FETCH_AGAIN, read_settings, shorten_value
from ladezeit.checkpoint.fingerprint import compute_fingerprint
from ladezeit.checkpoint.safetensors_header import TensorEntry, read_header
from ladezeit.checkpoint.tokenizer import has_tokenizer
from ladezeit.config import FolderModel, HubModel, ModelConfig, PackagedModel, SyntheticModel
from ladezeit.errors import CheckpointError

#: Types whose causal class is the text part: it takes its dtype from there, whatever is said above. A test holds this
#: to the installed library, which cannot be asked here.
TEXT_PARTS = frozenset({"dots3_note", "emu3", "llama4", "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp"})

__all__ = ["Checkpoint", "Progress", "TensorEntry", "inspect_checkpoint", "locate_checkpoint", "prepare_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """Files on disk that hold one model, checked to be complete.

    `config` is the content of config.json; `dtype` the torch name that ``from_pretrained(dtype="auto")`` picks.
    `weight_bytes` counts the tensors, `file_bytes` the whole shards. Equal `fingerprint` means the same
    weights, as far as config, headers and samples of the content tell (see `ladezeit.checkpoint.fingerprint`).
    """

    folder: Path
    shards: tuple[Path, ...]
    tensors: tuple[TensorEntry, ...]
    config: dict[str, Any]
    file_format: Literal["safetensors", "pickle"]
    fingerprint: str
    has_tokenizer: bool
    weight_bytes: int
    file_bytes: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `from_json`, ready for JSON; a tensor is a list, which keeps 18,867 of them cheap."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["folder"] = str(self.folder)
        plain["shards"] = [str(shard) for shard in self.shards]
        plain["tensors"] = [[t.name, t.dtype, t.shape, t.shard, t.begin, t.end] for t in self.tensors]
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Checkpoint":
        """Rebuild what `to_json` returned, without touching the disk."""
        tensors = (
            TensorEntry(name, dtype, tuple(shape), shard, begin, end)
            for name, dtype, shape, shard, begin, end in plain["tensors"]
        )
        files = {"folder": Path(plain["folder"]), "shards": tuple(map(Path, plain["shards"]))}
        return cls(**{**plain, **files, "tensors": tuple(tensors)})


def locate_checkpoint(model: ModelConfig, cache: Path) -> Path | None:
    """Return the folder of `model` where it is whole on this machine already, else None; changes nothing.

    Raises:
        CheckpointError, ConfigError: `model` cannot be had at all (no such package, unknown architecture).
    """
    match model:
        case FolderModel():
            folder = _own_folder(model)
            return folder if folder.is_dir() else None
        case SyntheticModel():
            return synthetic.locate_synthetic(model, cache)
        case PackagedModel():
            return packaged.locate_packaged(model, cache)
        case HubModel():
            return hub.locate_snapshot(model)
    raise TypeError(f"{type(model).__name__} is no kind of model")


def prepare_checkpoint(model: ModelConfig, cache: Path, progress: Progress | None = None) -> Checkpoint:
    """Make, convert or download `model` where needed, then `inspect_checkpoint` it.

    Args:
        model: one of the kinds of group ``model``.
        cache: where made and converted checkpoints are kept (see `cache_folder`).
        progress: see `Progress`; may be called from another thread, and must return at once.

    Raises:
        CheckpointError: it cannot be had, or is damaged, or the disk is too small.
        ConfigError: the architecture of a synthetic model is none this can write.
    """
    report = progress or (lambda what, done, total: None)
    match model:
        case FolderModel():
            folder = _own_folder(model)
        case SyntheticModel():
            folder = synthetic.prepare_synthetic(model, cache, report)
        case PackagedModel():
            folder = packaged.prepare_packaged(model, cache, report)
        case HubModel():
            folder = hub.prepare_snapshot(model, report)
        case _:
            raise TypeError(f"{type(model).__name__} is no kind of model")
    return inspect_checkpoint(folder, model.name)


def inspect_checkpoint(folder: Path, model_name: str) -> Checkpoint:
    """Check all headers in `folder` against their files and the index, and return what is there; reads only.

    Raises:
        CheckpointError: opened by `model_name`: the folder is no complete, undamaged and safe checkpoint.
    """
    try:
        return _inspect(folder)
    except CheckpointError as error:
        raise CheckpointError(f"model={model_name}: {error}") from error.__cause__
    except PermissionError as error:
        raise CheckpointError(f"model={model_name}: {error.filename} cannot be read: {error.strerror}") from error


def _own_folder(model: FolderModel) -> Path:
    return Path(model.path).expanduser().absolute()


def _inspect(folder: Path) -> Checkpoint:
    config = _config(folder)
    files = weight_files.find_weights(folder, config)
    if files.file_format == "safetensors":
        headers = [read_header(shard, number) for number, shard in enumerate(files.shards)]
        tensors = tuple(tensor for header in headers for tensor in header.tensors)
        in_order = sorted(tensors, key=lambda tensor: tensor.name)  # as safetensors lists them
        hashes = [header.sha256 for header in headers]
    else:
        tensors = pickle_scan.tensors_of(files.shards)
        in_order = list(tensors)
        hashes = ["pickle"] * len(files.shards)
    if not tensors:
        raise CheckpointError(f"{folder} holds no weights: {files.shards[0].name} has no tensors. Fetch it again")
    _check_unique(tensors, files.shards)
    if files.weight_map is not None:
        _check_index(files.weight_map, tensors, files.shards)
    return Checkpoint(
        folder=folder,
        shards=files.shards,
        tensors=tensors,
        config=config,
        file_format=files.file_format,
        fingerprint=compute_fingerprint(config, files.shards, hashes),
        has_tokenizer=has_tokenizer(folder),
        weight_bytes=sum(end - begin for _, begin, end in {(t.shard, t.begin, t.end) for t in tensors}),
        file_bytes=sum(shard.stat().st_size for shard in files.shards),
        dtype=_dtype(config, files.index_dtype, in_order, folder),
    )


def _config(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise CheckpointError(f"the folder {folder} does not exist. Give the folder that holds config.json")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file. Give the folder that holds config.json and the weights")
    config = read_settings(folder, "config.json")
    if config is None:
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))[:3]
        hint = f"; found one in {', '.join(inner)}" if inner else ""
        names = [entry.name for entry in folder.iterdir()]
        if weight_files.ADAPTER in names or any(name.endswith(".gguf") for name in names):
            raise CheckpointError(f"{folder} is not a checkpoint: {weight_files.describe_contents(folder)}")
        raise CheckpointError(
            f"{folder} has no config.json, so it is not a checkpoint{hint}. Give the folder that holds config.json"
        )
    return config


def _check_unique(tensors: Sequence[TensorEntry], shards: Sequence[Path]) -> None:
    home: dict[str, int] = {}
    for tensor in tensors:
        first = home.setdefault(tensor.name, tensor.shard)
        if first != tensor.shard:
            raise CheckpointError(
                f"{shards[tensor.shard]}: tensor '{shorten_value(tensor.name)}' stands in {shards[first].name} too; "
                f"which one is meant cannot be known. {FETCH_AGAIN}"
            )


def _check_index(weight_map: dict[str, int], tensors: Sequence[TensorEntry], shards: Sequence[Path]) -> None:
    found = {tensor.name: tensor.shard for tensor in tensors}
    if found == weight_map:
        return
    name = min(key for key in found.keys() | weight_map.keys() if found.get(key) != weight_map.get(key))
    said, is_in = weight_map.get(name), found.get(name)
    raise CheckpointError(
        f"{shards[0].parent}: index and shards disagree: tensor '{shorten_value(name)}' is said to be in "
        f"{shards[said].name if said is not None else 'no file'} and is in "
        f"{shards[is_in].name if is_in is not None else 'no file'}. {FETCH_AGAIN}"
    )


def _dtype(config: dict[str, Any], index_dtype: str | None, tensors: Sequence[TensorEntry], folder: Path) -> str:
    """Pick as transformers' `_get_dtype` does for ``auto``: config, index, first float tensor of the first file."""
    text = config.get("text_config")
    of_class = (text if isinstance(text, dict) else {}) if config.get("model_type") in TEXT_PARTS else config
    said = of_class.get("dtype")
    said = of_class.get("torch_dtype") if said is None else said
    said = index_dtype if said is None else said
    if isinstance(said, dict):
        said = said.get("", "float32")
    if said is None:
        return next((MODEL_DTYPES[t.dtype] for t in tensors if t.shard == 0 and t.dtype in MODEL_DTYPES), "float32")
    name = str(said).removeprefix("torch.")
    if name not in MODEL_DTYPES.values():
        raise CheckpointError(
            f"{folder / 'config.json'} gives the dtype {shorten_value(said)}; expected one of "
            f"{', '.join(sorted(MODEL_DTYPES.values()))}"
        )
    return name
