"""Which engines there are and what each needs, by the name that option files give in `make_engine`.

Nothing here imports an engine before it is asked for. A name with a colon is a user's own: ``package.module:Class``,
importable where the worker runs.
"""

import ctypes
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from ladezeit.errors import ConfigError, NotRunnableError, did_you_mean
from ladezeit.loading.base import Engine


@dataclass(frozen=True)
class EngineEntry:
    """An engine as it is known without importing it.

    `target` is ``module:Class``; `packages` are the modules it imports besides torch, transformers and safetensors;
    `devices` and `formats` what it can serve; `yields_tensors` whether it is a `TensorEngine`, whose tensors are made
    a model by `ladezeit.loading.build_model`. `releases` are requirements of package versions (``safetensors>=0.9``),
    `device_file` a path that a driver makes, without which the engine would do something else; `cuda_library` what it
    asks the system's loader for on a GPU. `make_converter`, as
    ``module:Class``, writes checkpoints in the format that the engine reads (see `ladezeit.loading.conversion`).
    """

    target: str
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    formats: tuple[str, ...] = ("safetensors",)
    yields_tensors: bool = False
    releases: tuple[str, ...] = ()
    device_file: str | None = None
    cuda_library: str | None = None
    converter: str | None = None


ENGINES = {
    "auto": EngineEntry("ladezeit.loading.auto:AutoEngine", formats=("safetensors", "pickle")),
    "transformers": EngineEntry(
        "ladezeit.loading.engines.transformers:TransformersEngine", formats=("safetensors", "pickle")
    ),
    "legacy_manager": EngineEntry(
        "ladezeit.loading.engines.legacy_manager:LegacyManagerEngine", formats=("safetensors", "pickle")
    ),
    "tensor_parallel": EngineEntry("ladezeit.loading.engines.tensor_parallel:TensorParallelEngine"),
    "streamed": EngineEntry("ladezeit.loading.streamed.engine:StreamedEngine", yields_tensors=True),
    "accelerate": EngineEntry(
        "ladezeit.loading.engines.accelerate:AccelerateEngine",
        converter="ladezeit.loading.formats.fused_experts:FusedExpertsConverter",
    ),
    "bitsandbytes_8bit": EngineEntry(
        "ladezeit.loading.engines.quantized:QuantizedEngine",
        formats=("safetensors", "pickle"),
        packages=("bitsandbytes",),
        releases=("bitsandbytes>=0.50",),
    ),
    "bitsandbytes_4bit": EngineEntry(
        "ladezeit.loading.engines.quantized:QuantizedEngine",
        formats=("safetensors", "pickle"),
        packages=("bitsandbytes",),
        releases=("bitsandbytes>=0.50",),
    ),
    "torchao_int8": EngineEntry(
        "ladezeit.loading.engines.quantized:QuantizedEngine",
        formats=("safetensors", "pickle"),
        packages=("torchao",),
        releases=("torchao>=0.18",),
    ),
    "safetensors_mmap": EngineEntry("ladezeit.loading.engines.safetensors:SafetensorsMmapEngine", yields_tensors=True),
    "safetensors_pread": EngineEntry(
        "ladezeit.loading.engines.safetensors:SafetensorsPreadEngine",
        yields_tensors=True,
        releases=("safetensors>=0.8",),
    ),
    "safetensors_prefetch": EngineEntry(
        "ladezeit.loading.engines.safetensors:SafetensorsPrefetchEngine",
        devices=("cuda",),
        yields_tensors=True,
        releases=("safetensors>=0.9.0rc1",),
    ),
    "fastsafetensors": EngineEntry(
        "ladezeit.loading.engines.fastsafetensors:FastsafetensorsEngine",
        packages=("fastsafetensors",),
        yields_tensors=True,
        releases=("fastsafetensors>=0.5",),
        cuda_library="libcudart.so",
    ),
    "fastsafetensors_gds": EngineEntry(
        "ladezeit.loading.engines.fastsafetensors:FastsafetensorsGdsEngine",
        packages=("fastsafetensors",),
        devices=("cuda",),
        yields_tensors=True,
        releases=("fastsafetensors>=0.5",),
        device_file="/dev/nvidia-fs0",
        cuda_library="libcudart.so",
    ),
    "runai_streamer": EngineEntry(
        "ladezeit.loading.engines.runai:RunaiStreamerEngine",
        packages=("runai_model_streamer",),
        yields_tensors=True,
        releases=("runai-model-streamer>=0.17",),
    ),
    "instanttensor": EngineEntry(
        "ladezeit.loading.engines.instanttensor:InstanttensorEngine",
        packages=("instanttensor",),
        devices=("cuda",),
        yields_tensors=True,
        releases=("instanttensor>=0.2",),
    ),
    "instanttensor_buffered": EngineEntry(
        "ladezeit.loading.engines.instanttensor:InstanttensorBufferedEngine",
        packages=("instanttensor",),
        devices=("cuda",),
        yields_tensors=True,
        releases=("instanttensor>=0.2",),
    ),
    "tensorizer": EngineEntry(
        "ladezeit.loading.engines.tensorizer:TensorizerEngine",
        packages=("tensorizer",),
        yields_tensors=True,
        releases=("tensorizer>=2.12",),
        converter="ladezeit.loading.formats.tensorizer:TensorizerConverter",
    ),
    "gguf": EngineEntry(
        "ladezeit.loading.engines.gguf:GgufEngine",
        packages=("gguf",),
        converter="ladezeit.loading.formats.gguf:GgufConverter",
    ),
    "torch_dcp": EngineEntry("ladezeit.loading.engines.torch_dcp:TorchDcpEngine", yields_tensors=True),
    "traced": EngineEntry("ladezeit.loading.engines.traced:TracedEngine", formats=("safetensors", "pickle")),
}


def check_engine(name: str, device: str, file_format: str) -> None:
    """Check that `name` is an engine that can run here, without importing it.

    Args:
        name: as in `loading.engine`.
        device: torch's name of the run's device.
        file_format: of the checkpoint, as `Checkpoint.file_format` has it.

    Raises:
        ConfigError: there is no such engine.
        NotRunnableError: it needs another device or format, or a package that is not installed; with the cure.
    """
    if ":" in name:
        check_module("loading.engine", name)
        return
    if name not in ENGINES:
        raise ConfigError(
            f"loading.engine={name} is not an engine: there are {', '.join(ENGINES)}, and your own as module:Class."
            + did_you_mean(name, ENGINES)
        )
    entry = ENGINES[name]
    kind = device.partition(":")[0]
    if kind not in entry.devices:
        raise NotRunnableError(
            f"loading.engine={name} needs {' or '.join(entry.devices).upper()}: the run is on {kind}. "
            f"Use a machine that has it, or another loading method"
        )
    if file_format not in entry.formats:
        raise NotRunnableError(
            f"loading.engine={name} reads {' and '.join(entry.formats)}: the checkpoint is {file_format}"
        )
    missing = [package for package in entry.packages if find_spec(package) is None]
    if missing:
        raise NotRunnableError(
            f"loading.engine={name} needs {', '.join(missing)}, not installed: pip install 'ladezeit[engines]'"
        )
    _check_releases(name, entry.releases)
    if entry.device_file is not None and not Path(entry.device_file).exists():
        raise NotRunnableError(
            f"loading.engine={name} needs the driver behind {entry.device_file}, which this machine does not have. "
            f"Load the driver's kernel module (in a container: pass the device in), or use another loading method"
        )
    if kind == "cuda" and entry.cuda_library is not None:
        _check_library(name, entry.cuda_library)


def make_engine(name: str) -> Engine:
    """Return a new engine; raises `ConfigError` where it cannot be imported."""
    entry = ENGINES.get(name, EngineEntry(name))
    module, _, attribute = entry.target.partition(":")
    try:
        made: Any = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as cause:
        raise ConfigError(f"loading.engine={name} cannot be imported: {cause}") from cause
    if entry.yields_tensors or hasattr(made, "open"):
        from ladezeit.loading.build_model import StateDictEngine

        made = StateDictEngine(made)
    return made  # type: ignore[no-any-return]


def make_converter(name: str) -> str | None:
    """Return the converter to the format of the engine `name`; None where it reads all checkpoints as they are."""
    return ENGINES[name].converter if name in ENGINES else None


def _check_releases(name: str, releases: tuple[str, ...]) -> None:
    for requirement in map(Requirement, releases):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            raise NotRunnableError(
                f"loading.engine={name} needs {requirement}: "
                f"{'it is not installed' if found is None else f'{found} is installed'}. "
                f"pip install --pre '{requirement}'"
            )


def _check_library(name: str, library: str) -> None:
    try:
        ctypes.CDLL(library)
    except OSError as cause:
        raise NotRunnableError(
            f"loading.engine={name} asks the system for {library}, which is not found. Install the CUDA toolkit; or "
            f"make a link of that name to the {library}.N of pip's packages (site-packages/nvidia/*/lib) in a folder "
            f"of its own, and start with that folder in LD_LIBRARY_PATH"
        ) from cause


def check_module(key: str, name: str) -> None:
    """Raise `ConfigError` where the module of ``module:name``, the value of `key`, is not there to be imported."""
    module = name.partition(":")[0]
    if module in sys.modules:
        return
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ConfigError(f"{key}={name}: there is no module '{module}' to import. Is it on PYTHONPATH?")
