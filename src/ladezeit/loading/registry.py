"""Which engines there are, by the name that option files give in `engine`; none is imported before it is asked for."""

from importlib import import_module

from ladezeit.errors import ConfigError, did_you_mean
from ladezeit.loading.base import Engine

ENGINES = {
    "transformers": "ladezeit.loading.transformers_engine:TransformersEngine",
    "legacy_manager": "ladezeit.loading.legacy_manager:LegacyManagerEngine",
}


def engine(name: str) -> Engine:
    """Return a new engine; raises `ConfigError` for a name that is not one."""
    if name not in ENGINES:
        raise ConfigError(
            f"loading.engine={name} is not an engine: there are {', '.join(ENGINES)}." + did_you_mean(name, ENGINES)
        )
    module, _, attribute = ENGINES[name].partition(":")
    made: Engine = getattr(import_module(module), attribute)()
    return made
