"""Which files of a folder hold its weights, found as `from_pretrained` finds them and never outside the folder.

Its JSON files too, which are of unknown origin and read with care.
"""

import json
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn

from ladezeit.errors import CheckpointError
from ladezeit.errors import shorten_value as shorten_value  # noqa: PLC0414  # for who reads files

SINGLE = {"safetensors": "model.safetensors", "pickle": "pytorch_model.bin"}
INDEX = {"safetensors": "model.safetensors.index.json", "pickle": "pytorch_model.bin.index.json"}

#: An index of 18,867 tensors has 2 MB, the config.json of a large vision model some 50 kB.
MOST_BYTES = 100_000_000
MOST_SETTINGS_BYTES = 10_000_000

#: What helps where files do not agree with each other.
FETCH_AGAIN = "Fetch the checkpoint again; where it was published like this, only its publisher can mend it"

ADAPTER = "adapter_config.json"

#: Names of weights that `from_pretrained` takes only where it is asked for their variant.
_VARIANT = re.compile(r"(model|pytorch_model)\.(?!safetensors)\w+(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")

FileFormat = Literal["safetensors", "pickle"]


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold the weights, sorted by name, and what the index says of them where there is one.

    `weight_map` maps each tensor to its file's position in `shards`; `index_dtype` is the dtype that some writers put
    into the index.
    """

    shards: tuple[Path, ...]
    file_format: FileFormat
    weight_map: dict[str, int] | None = None
    index_dtype: str | None = None


def find_weights(folder: Path, config: dict[str, Any]) -> WeightFiles:
    """Return the weights of `folder`; safetensors before pickle, one file before an index, as transformers does.

    Raises:
        CheckpointError: there are none, a file the index names is missing or lies elsewhere, or the index is malformed.
    """
    explicit = config.get("transformers_weights")
    if explicit is not None:
        return _explicit(folder, explicit)
    formats: tuple[FileFormat, ...] = ("safetensors", "pickle")
    for file_format in formats:
        if (folder / SINGLE[file_format]).exists():
            return WeightFiles((resolve_contained(folder, SINGLE[file_format], "config.json"),), file_format)
        if (folder / INDEX[file_format]).exists():
            return _from_index(folder, INDEX[file_format], file_format)
    raise CheckpointError(f"{folder} holds no weights: {describe_contents(folder)}")


def brings_adapter(folder: Path) -> bool:
    """Return whether `from_pretrained` adds an adapter to the model in `folder`: where `peft` is installed."""
    return (folder / ADAPTER).is_file() and find_spec("peft") is not None


def resolve_contained(folder: Path, name: str, named_by: str) -> Path:
    """Return the path of `name` in `folder`, which must be a regular file inside it.

    A link may leave the folder only for the blobs of the hub cache's repository that the folder is a snapshot of. Where
    these lie, or lead to, is their owner's matter: what is fetched makes no links among them.

    Raises:
        CheckpointError: opened by the file that `named_by` names.
    """
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{folder / named_by} names the file '{shorten_value(name)}', which lies outside its folder. Do not use "
            f"this "
            f"checkpoint unless you know why"
        )
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        broken = " (a link whose target is gone)" if path.is_symlink() else ""
        raise CheckpointError(
            f"{folder / named_by} names the file '{shorten_value(name)}', which is missing{broken}. Fetch the "
            f"checkpoint "
            f"again"
        ) from None
    if not any(real.is_relative_to(home) for home in _homes(folder)) and not _is_blob(path, folder):
        raise CheckpointError(
            f"{path} is a link to {real}, outside its folder. Put the file itself there, or give the folder that has it"
        )
    if not real.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    return path


def _homes(folder: Path) -> tuple[Path, ...]:
    """The folder, and the blobs folder beside it where it is a snapshot in a hub cache (<repo>/snapshots/<commit>)."""
    real = folder.resolve()
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        return real, (real.parent.parent / "blobs").resolve()
    return (real,)


def _is_blob(path: Path, folder: Path) -> bool:
    """Return whether `path` is a link right to an entry of the blobs folder, whatever that entry is linked to."""
    if not path.is_symlink() or len(_homes(folder)) < 2:
        return False
    target = path.parent.resolve() / path.readlink()
    return target.name not in ("", "..") and target.parent.resolve() == _homes(folder)[1]


def _explicit(folder: Path, name: object) -> WeightFiles:
    if isinstance(name, str) and name.endswith(".safetensors.index.json"):
        return _from_index(folder, name, "safetensors")
    if isinstance(name, str) and name.endswith(".safetensors"):
        return WeightFiles((resolve_contained(folder, name, "config.json"),), "safetensors")
    raise CheckpointError(
        f"{folder / 'config.json'} names its weights transformers_weights={shorten_value(name)}: expected a "
        f".safetensors "
        f"file or a .safetensors.index.json"
    )


def _from_index(folder: Path, index_name: str, file_format: FileFormat) -> WeightFiles:
    index = resolve_contained(folder, index_name, "config.json")
    content = read_object(index)
    mapping, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise CheckpointError(f"{index} is malformed: weight_map must be an object of tensor names to file names")
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{index} is malformed: metadata must be an object (transformers reads it)")
    names = sorted(set(mapping.values()))
    suffix = ".safetensors" if file_format == "safetensors" else ".bin"
    for name in names:
        if not name.endswith(suffix):
            raise CheckpointError(f"{index} names '{shorten_value(name)}', which is not a {suffix} file")
    position = {name: number for number, name in enumerate(names)}
    dtype = metadata.get("dtype")
    return WeightFiles(
        shards=tuple(resolve_contained(folder, name, index_name) for name in names),
        file_format=file_format,
        weight_map={tensor: position[name] for tensor, name in mapping.items()},
        index_dtype=dtype if isinstance(dtype, str) else None,
    )


def describe_contents(folder: Path) -> str:
    """Return what `folder` has where weights were expected, and what to do."""
    names = sorted(entry.name for entry in os.scandir(folder))
    if ADAPTER in names:
        return "it is an adapter (adapter_config.json). Give the folder of the whole model, with the adapter merged"
    variant = next((name.split(".")[1] for name in names if _VARIANT.fullmatch(name)), None)
    if variant is not None:
        return f"it has the variant '{variant}' alone. Take '.{variant}' out of its files' names"
    loose = [name for name in names if name.endswith((".safetensors", ".bin"))]
    if loose:
        return (
            f"found {shorten_value(', '.join(loose))}, but neither {SINGLE['safetensors']} nor the index "
            f"{INDEX['safetensors']} that says how they belong together. Fetch the index too"
        )
    if any(name.endswith(".gguf") for name in names):
        return "it has a GGUF file, which is not loaded from here. Convert it to safetensors with save_pretrained"
    return f"expected {SINGLE['safetensors']} or {INDEX['safetensors']}. Fetch the checkpoint again"


# JSON from files of unknown origin: bounded, no duplicate keys, and never an error but `CheckpointError`.


def parse_object(raw: bytes, what: str, *, constants: bool = False) -> dict[str, Any]:
    """Return the JSON object in `raw`; `what` opens the message of the error.

    `constants` lets pass Infinity and NaN, which are not JSON: Python writes them, and `transformers` reads them.

    Raises:
        CheckpointError: no UTF-8, no JSON, no object, or a key stands there twice.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=float if constants else _no_constant,
        )
    except RecursionError:
        raise CheckpointError(f"{what} is not valid: it is nested too deeply to be read") from None
    except ValueError as cause:
        raise CheckpointError(f"{what} is not valid JSON: {shorten_value(cause)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not valid: expected an object, found {type(value).__name__}")
    return value


def read_settings(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the settings in the file `name` of `folder`, Infinity and NaN among them; None where there is none.

    Raises:
        CheckpointError: the file lies outside the folder, or is anything but a JSON object of at most 10 MB.
    """
    if not (folder / name).exists():
        return None
    return read_object(resolve_contained(folder, name, name), most_bytes=MOST_SETTINGS_BYTES, constants=True)


def read_object(path: Path, *, most_bytes: int = MOST_BYTES, constants: bool = False) -> dict[str, Any]:
    """Return the JSON object in the file `path`; raises `CheckpointError` as `parse_object` does, or if unreadable."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        if found.st_size > most_bytes:
            raise CheckpointError(f"{path} has {found.st_size} bytes: at most {most_bytes} are read as JSON")
        return parse_object(path.read_bytes(), str(path), constants=constants)
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read: {cause.strerror}") from cause


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key '{shorten_value(twice)}' occurs twice")
    return unique


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
