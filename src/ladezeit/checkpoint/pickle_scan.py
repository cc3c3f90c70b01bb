"""What a ``.bin`` checkpoint holds, found out in another process and without executing any of it.

`tensors_of` is the caller's side and imports nothing heavy. ``python -m ladezeit.checkpoint.pickle_scan FILE...`` is
the other side: it imports torch, scans each file's pickle statically, loads it to the meta device with
``weights_only=True``, and prints one JSON object.
"""

import io
import json
import pickletools
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.dtypes import DTYPE_BITS, STORED_NAMES
from ladezeit.checkpoint.files import parse_object, shorten_value
from ladezeit.checkpoint.safetensors_header import TensorEntry
from ladezeit.errors import CheckpointError

_TIME_LIMIT_S = 300.0
#: How much of a legacy file is scanned for names, in bytes; its pickle stands at the start.
_SCANNED_BYTES = 16 * 1024**2
#: What a pickle of tensors, and of the mapping that holds them, refers to.
_TENSORS_ALONE = re.compile(
    r"torch\.(\w+Storage|_utils\._rebuild_(tensor|tensor_v2|parameter))|torch\.nn\.parameter\.Parameter"
    r"|collections\.OrderedDict"
)
_CURE = "Convert it to safetensors where you trust it, or use a checkpoint that has safetensors"


def tensors_of(shards: Sequence[Path]) -> tuple[TensorEntry, ...]:
    """Return the tensors of pickle files, with their bytes' places in the files.

    Raises:
        CheckpointError: a file is not safe to load, not in torch's zip format, or no plain mapping of names to tensors.
    """
    command = [sys.executable, "-P", "-m", "ladezeit.checkpoint.pickle_scan", *map(str, shards)]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_TIME_LIMIT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{shards[0].parent}: its .bin files were not checked in {_TIME_LIMIT_S:.0f} s") from None
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise CheckpointError(
            f"{shards[0].parent}: its .bin files could not be checked: {shorten_value(last[0])}. {_CURE}"
        )
    answer = parse_object(done.stdout, "the answer of the check of .bin files")
    if answer["refusal"] is not None:
        raise CheckpointError(answer["refusal"])
    return tuple(
        TensorEntry(name, dtype, tuple(shape), number, begin, end)
        for number, tensors in enumerate(answer["files"])
        for name, dtype, shape, begin, end in tensors
    )


def main(paths: Sequence[str]) -> None:
    """Check the files and print ``{"refusal": text or null, "files": [[[name, dtype, shape, begin, end], …], …]}``."""
    answer: dict[str, Any] = {"refusal": None, "files": []}
    try:
        answer["files"] = [_check(Path(path)) for path in paths]
    except CheckpointError as refusal:
        answer["refusal"] = str(refusal)
    print(json.dumps(answer))


def _check(path: Path) -> list[list[Any]]:
    _refuse_other_formats(path)
    import torch

    try:
        unsafe = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception as cause:  # whatever torch finds wrong with it: the file is hostile or damaged
        raise _not_safe(path, sorted(_globals_in_zip(path)), str(cause)) from None
    if unsafe:
        raise _not_safe(path, unsafe, "")
    try:
        loaded = torch.load(path, map_location="meta", weights_only=True)
    except Exception as cause:
        raise CheckpointError(
            f"{path} cannot be loaded with weights_only=True: {shorten_value(cause)}. {_CURE}"
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise CheckpointError(f"{path} holds {type(loaded).__name__}, not a mapping of names to tensors. {_CURE}")
    return [_describe(path, name, tensor) for name, tensor in loaded.items()]


def _refuse_other_formats(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(_SCANNED_BYTES if not zipfile.is_zipfile(path) else 4)
    if not zipfile.is_zipfile(path):
        if start[:1] != b"\x80":
            raise CheckpointError(f"{path} is no file of torch.save (or truncated). Fetch it again")
        found = sorted(set(_globals_in(start)))
        if found and all(map(_TENSORS_ALONE.fullmatch, found)):
            raise CheckpointError(
                f"{path} is in torch's format of before 1.6, which is not read here; it holds tensors alone. Load it "
                f"with transformers once and save it with save_pretrained, which writes safetensors"
            )
        raise _not_safe(path, found, "it is in torch's old format, a bare pickle")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} holds compressed data, which torch.save never writes. {_CURE}")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path} claims more data than it holds. {_CURE}")


def _not_safe(path: Path, found: list[str], why: str) -> CheckpointError:
    names = f" It would call: {shorten_value(', '.join(found), 400)}." if found else ""
    reason = f" ({shorten_value(why)})" if why else ""
    return CheckpointError(f"{path} is not safe to load{reason}; nothing of it was executed.{names} {_CURE}")


def _globals_in_zip(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return {
            name
            for entry in archive.infolist()
            if entry.filename.endswith(".pkl")
            for name in _globals_in(archive.read(entry)[:_SCANNED_BYTES])
        }


def _globals_in(raw: bytes) -> Iterator[str]:
    """Yield ``module.name`` of what the pickles in `raw` refer to, by reading opcodes; stops where they end."""
    stream = io.BytesIO(raw)
    texts = ["?", "?"]
    try:
        while True:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(texts[-2:])
                elif isinstance(argument, str):
                    texts.append(argument)
    except ValueError:
        return  # the raw data behind the pickles, or nonsense


def _describe(path: Path, name: str, tensor: Any) -> list[Any]:
    import torch

    shown = f"{path}: '{shorten_value(name)}'"
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{shown} is {type(tensor).__name__}, not a plain tensor. {_CURE}")
    dtype = STORED_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if dtype is None or offset is None or not tensor.is_contiguous():
        raise CheckpointError(f"{shown} ({tensor.dtype}) is not stored as plain consecutive values. {_CURE}")
    begin = offset + tensor.storage_offset() * tensor.element_size()
    end = begin + tensor.numel() * DTYPE_BITS[dtype] // 8
    if end > path.stat().st_size:
        raise CheckpointError(f"{path} is truncated: '{shorten_value(name)}' ends at byte {end}. Fetch it again")
    return [name, dtype, list(tensor.shape), begin, end]


if __name__ == "__main__":
    main(sys.argv[1:])
