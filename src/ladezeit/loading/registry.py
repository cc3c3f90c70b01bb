"""Whether an engine can run here, and the engine itself, by the name that option files give in `engine`.

What each needs stands in its own file in `engines`. A name with a colon is a user's own: ``package.module:Class``,
importable where the worker runs.
"""

import ctypes
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from packaging.requirements import Requirement

from ladezeit.config.engines import engine_facts, find_engines
from ladezeit.errors import ConfigError, NotRunnableError
from ladezeit.loading.base import Engine, EngineSpec


def engine_specs() -> dict[str, EngineSpec[Any]]:
    """Return all engines by name; imports their files, and nothing of what they load with."""
    return cast("dict[str, EngineSpec[Any]]", find_engines())


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
    entry = engine_facts(name)
    if entry is None:
        check_module("loading.engine", name)
        return
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
    module, colon, attribute = name.partition(":")
    try:
        made: Any = getattr(import_module(module), attribute)() if colon else engine_specs()[name].make()
    except (ImportError, AttributeError) as cause:
        raise ConfigError(f"loading.engine={name} cannot be imported: {cause}") from cause
    if hasattr(made, "open"):
        from ladezeit.loading.build_model import StateDictEngine

        made = StateDictEngine(made)
    return made  # type: ignore[no-any-return]


def make_converter(name: str) -> str | None:
    """Return the converter to the format of the engine `name`; None where it reads all checkpoints as they are."""
    facts = engine_facts(name)
    return None if facts is None else facts.converter


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
