"""A sweeper that knows all points before the first is measured.

With any other application it is Hydra's basic sweeper, order included. With ladezeit's it hands all points to
`ladezeit.sweep.conductor.run_sweep`, which checks, orders and measures them; the launcher that was configured still
runs the jobs.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import basic_sweeper
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from ladezeit.errors import ConfigError


@dataclass
class LadezeitSweeperConf:
    """`params` sweeps by default (``loading: a,b``), the command line wins; `max_batch_size` is for other apps."""

    _target_: str = "hydra_plugins.ladezeit_sweeper.sweeper.LadezeitSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="ladezeit", node=LadezeitSweeperConf, provider="ladezeit")


class LadezeitSweeper(Sweeper):
    """Hydra's basic sweeper, which leaves ladezeit's own sweeps to ladezeit.

    The basic sweeper is a part of it, not its base: Hydra's plugin scan runs plugin modules anew, and a base class from
    before a scan is not the one that `super` inside it means afterwards.
    """

    def __init__(self, max_batch_size: int | None, params: dict[str, str] | None = None) -> None:
        self._basic = basic_sweeper.BasicSweeper(max_batch_size=max_batch_size, params=params)
        self._ours = False

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See `hydra.plugins.sweeper.Sweeper.setup`."""
        self._basic.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.hydra_context = hydra_context
        self.config = config
        self._ours = getattr(task_function, "__module__", "") == "ladezeit.cli.run"

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep and return the jobs' outcomes, one list a batch."""
        if not self._ours:
            return self._basic.sweep(arguments)
        from ladezeit.sweep.conductor import run_sweep

        assert self.hydra_context is not None and self.config is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides([*self._basic._parse_config(), *arguments])
        jobs = [job for batch in self._basic.split_arguments(parsed, None) for job in batch]
        self._check_subfolders(jobs)
        folder = Path(str(self.config.hydra.sweep.dir))
        return [run_sweep(jobs, self._compose, lambda ordered: self._launch(ordered, folder), folder)]

    def _check_subfolders(self, jobs: list[list[str]]) -> None:
        """Refuse a name for the jobs' folders that is the same for several: each would be refused by the one before."""
        assert self.hydra_context is not None and self.config is not None
        template = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)
        assert isinstance(template, dict)
        if "hydra.job." in str(template["subdir"]):  # its number, or what it overrides
            return
        names: set[str] = set()
        for job in jobs:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(job))
            HydraConfig.instance().set_config(composed)
            name = str(composed.hydra.sweep.subdir)
            if name in names:
                raise ConfigError(
                    f"hydra.sweep.subdir is {name!r} for several samples (the second is {' '.join(job)}): give "
                    f"each its own, for example with ${{hydra.job.num}} in it. Nothing was started"
                )
            names.add(name)

    def _compose(self, overrides: list[str]) -> DictConfig:
        assert self.hydra_context is not None and self.config is not None
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        HydraConfig.instance().set_config(composed)
        point = copy.deepcopy(composed)
        with open_dict(point):
            del point["hydra"]
        return point

    def _launch(self, ordered: list[list[str]], folder: Path) -> Sequence[JobReturn]:
        launcher = self._basic.launcher
        assert launcher is not None and self.config is not None
        OmegaConf.save(self.config, folder / "multirun.yaml")
        return launcher.launch(ordered, initial_job_idx=0)
