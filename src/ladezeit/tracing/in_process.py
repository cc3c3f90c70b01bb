"""Samples in the process of whoever asks: composed without a command line, measured, and written like any other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ladezeit.config import RunConfig, build_config
from ladezeit.config.hydra_support import explain_error, register_schemas
from ladezeit.config.serialize import point_id
from ladezeit.errors import ConfigError, LadezeitError
from ladezeit.loading.engines.traced import loader_given
from ladezeit.results.labels import make_label
from ladezeit.results.records import FILE_NAME, Identity, Result
from ladezeit.sweep import job
from ladezeit.sweep.session import Session


def measure_in_process(load: Callable[..., Any], words: list[str], folder: Path, repeats: int) -> list[Result]:
    """Measure `load` `repeats` times in this process, into ``folder/0``, ``folder/1``, …

    Raises:
        LadezeitError: what was asked for has no meaning, or a result lies there already.
    """
    composed = compose_here([*words, "process=inline"], folder)
    results = []
    session = Session()
    try:
        with loader_given(load):
            for sample in range(repeats):
                results.append(_measure(session, replace(composed, sample=sample), words, folder / str(sample)))
    finally:
        session.close()
    return results


def _measure(session: Session, own: RunConfig, words: list[str], folder: Path) -> Result:
    if (folder / FILE_NAME).exists():
        raise LadezeitError(f"{folder} holds a result already: choose another output, nothing measured is overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    named = make_label({"cache": own.cache.state.value, "loading": own.loading.name}, own.sample)
    again = job.rerun_command([*words, "process=fresh"], in_sweep=False)
    prepared = session.prepare(own)
    return job.measure_sample(
        session, prepared, Identity(point_id(own), own.sample, own.sample, named, words, again), folder
    )


def compose_here(words: list[str], outputs: Path) -> RunConfig:
    """Compose overrides as the command line would, and leave this process's own Hydra as it was.

    Raises:
        ConfigError: they do not compose, or a value is out of range.
    """
    try:
        with _hydra():
            return build_config(compose("config", overrides=[*words, f"outputs='{outputs}'"]))
    except (OmegaConfBaseException, HydraException) as error:
        raise ConfigError(explain_error(error)) from error


@contextmanager
def _hydra() -> Iterator[None]:
    """Have Hydra composed from ladezeit's own options for the block."""
    register_schemas()
    plugins = Plugins.instance()
    from hydra_plugins.ladezeit_sweeper.sweeper import LadezeitSweeper

    plugins.register(LadezeitSweeper)
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("ladezeit.conf", version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = before
