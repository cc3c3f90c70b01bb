"""Which engines there are, by the name that option files give in `engine`; none is imported before it is asked for.

A name with a colon is a user's own: ``package.module:Class``, importable where the worker runs.
"""

from importlib import import_module
from importlib.util import find_spec

from ladezeit.errors import ConfigError, did_you_mean
from ladezeit.loading.base import Engine

ENGINES = {
    "transformers": "ladezeit.loading.transformers_engine:TransformersEngine",
    "legacy_manager": "ladezeit.loading.legacy_manager:LegacyManagerEngine",
}


def check(name: str) -> None:
    """Check that `name` is an engine, without importing one; raises `ConfigError` where it is not."""
    if name in ENGINES:
        return
    module, colon, _ = name.partition(":")
    if not colon:
        raise ConfigError(
            f"loading.engine={name} is not an engine: there are {', '.join(ENGINES)}, and your own as module:Class."
            + did_you_mean(name, ENGINES)
        )
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ConfigError(f"loading.engine={name}: there is no module '{module}' to import. Is it on PYTHONPATH?")


def engine(name: str) -> Engine:
    """Return a new engine; raises `ConfigError` for a name that is not one."""
    check(name)
    module, _, attribute = ENGINES.get(name, name).partition(":")
    try:
        made: Engine = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as cause:
        raise ConfigError(f"loading.engine={name} cannot be imported: {cause}") from cause
    return made
