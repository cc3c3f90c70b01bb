"""Puts the schemas where Hydra finds them; the one module of `config` that imports Hydra, for those who compose."""

from hydra.core.config_store import ConfigStore

from ladezeit.config.kinds import KINDS
from ladezeit.config.run import RunConfig


def register() -> None:
    """Store the schemas where option files find them; under ``schema/`` so that `glob(*)` of a group never sees one."""
    store = ConfigStore.instance().store
    store(name="run", group="schema", node=RunConfig)
    for group, nodes in KINDS.items():
        for name, node in nodes.items():
            store(name=name, group=f"schema/{group}", node=node)
