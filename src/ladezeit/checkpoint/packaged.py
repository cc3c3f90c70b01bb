"""A real model without a hub: the GGUF file inside an installed Python package, converted once to safetensors.

`locate_packaged` and `prepare_packaged` are the caller's side and neither import the package nor anything heavy.
``python -m ladezeit.checkpoint.packaged`` is the other side and imports torch and transformers.
"""

import importlib.util
import sys
from functools import cache as once
from pathlib import Path
from typing import Any, cast

from ladezeit.checkpoint.cache import Progress, Recipe, build_entry, find_entry
from ladezeit.checkpoint.fingerprint import sampled_digest
from ladezeit.config import PackagedModel
from ladezeit.errors import CheckpointError
from ladezeit.system.processes import answer_request, run_module_json

#: Version of the conversion: raise it when the same GGUF would give another checkpoint.
_CONVERTER = 1
#: A 4-bit GGUF grows 3.6 times when it becomes bfloat16; coarser ones are rare.
_GROWTH = 4
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "CUDA_VISIBLE_DEVICES": "",
}


def locate_packaged(model: PackagedModel, cache: Path) -> Path | None:
    """Return the folder of the converted `model` if it is in `cache`; changes nothing.

    Raises:
        CheckpointError: the package is not installed or has no such file.
    """
    return find_entry(cache, _recipe(model, gguf_path(model)))


def prepare_packaged(model: PackagedModel, cache: Path, progress: Progress) -> Path:
    """Convert `model` into `cache` if it is not there yet, and return its folder.

    Raises:
        CheckpointError: as `locate_packaged` does; or the conversion failed, or the disk is too small.
    """
    source = gguf_path(model)

    def convert_apart(folder: Path) -> None:
        progress(f"converting {source.name} to bfloat16 safetensors", 0, 0)
        request = {"source": str(source), "folder": str(folder)}
        who, what = f"model={model.name}", f"the conversion of {source}"
        run_module_json("ladezeit.checkpoint.packaged", request, who, what, variables=_QUIET)

    return build_entry(cache, _recipe(model, source), convert_apart, progress)


def gguf_path(model: PackagedModel) -> Path:
    """Return where the installed package has the file, without importing the package.

    Raises:
        CheckpointError: the package is not installed or has no such file.
    """
    spec = importlib.util.find_spec(model.package) if model.package.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise CheckpointError(
            f"model={model.name} comes from the Python package '{model.package}', which is not installed here. "
            f"Install it with: {model.install}"
        )
    if Path(model.file).name != model.file:
        raise CheckpointError(f"model.file={model.file} must be the name of a file in the package '{model.package}'")
    for folder in folders:
        if (path := Path(folder) / model.file).is_file():
            return path
    others = sorted(path.name for folder in folders for path in Path(folder).glob("*.gguf"))
    raise CheckpointError(
        f"model={model.name}: the package '{model.package}' has no file {model.file}; its GGUF files: "
        f"{', '.join(others) or 'none'}. Install the version that has it with: {model.install}"
    )


def convert_gguf(source: Path, folder: Path) -> None:
    """Write the GGUF file `source` as a bfloat16 checkpoint with tokenizer into `folder`; imports torch."""
    import torch
    import transformers

    place: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    arguments: dict[str, Any] = {"dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # without it, from_pretrained dequantizes anyway
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, **arguments)
    wrong = {name for name, weight in model.named_parameters() if weight.dtype != torch.bfloat16}
    if wrong:
        raise CheckpointError(f"{source}: not bfloat16 after the conversion: {', '.join(sorted(wrong)[:3])}")
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _without_repeated_work() -> None:
    """Have the libraries do once, or on plain arrays, what takes them half of a conversion; for a process of its own.

    The reader slices a `numpy.memmap` some million times, which is several times as slow as an array on the same
    memory; and transformers has the table of an architecture's tensor names made anew for each module.
    """
    import gguf
    import numpy

    mapped, arrays, names = numpy.memmap, cast(Any, numpy), cast(Any, gguf)
    arrays.memmap = lambda *args, **named: mapped(*args, **named).view(numpy.ndarray)
    names.get_tensor_name_map = once(gguf.get_tensor_name_map)


def _recipe(model: PackagedModel, source: Path) -> Recipe:
    return Recipe(
        name=model.name,
        kind="packaged",
        identity={
            "converter": _CONVERTER,
            "package": model.package,
            "file": model.file,
            "content": sampled_digest(source),
        },
        needed_bytes=_GROWTH * source.stat().st_size,
    )


def make(request: dict[str, Any]) -> dict[str, Any]:
    """Convert in this process, which is for nothing else."""
    _without_repeated_work()
    convert_gguf(Path(request["source"]), Path(request["folder"]))
    return {}


if __name__ == "__main__":
    sys.exit(answer_request(make, sys.argv[1:]))
