"""ladezeit: the fastest correct way to get a Hugging Face language model onto your GPU, found, proven and kept."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public names and the modules that have them, imported at their first use: ``import ladezeit`` alone costs nothing.
_HOMES = {
    "LoadedModel": "ladezeit.serving.loaded",
    "ModelManager": "ladezeit.serving.manager",
    "evict": "ladezeit.serving.page_cache",
    "load": "ladezeit.serving.load",
    "phase": "ladezeit.phase_marks",
    "prefetch": "ladezeit.serving.page_cache",
    "trace": "ladezeit.sweep.own_load",
}

if TYPE_CHECKING:
    from ladezeit.phase_marks import phase as phase
    from ladezeit.serving.load import load as load
    from ladezeit.serving.loaded import LoadedModel as LoadedModel
    from ladezeit.serving.manager import ModelManager as ModelManager
    from ladezeit.serving.page_cache import evict as evict
    from ladezeit.serving.page_cache import prefetch as prefetch
    from ladezeit.sweep.own_load import trace as trace

__all__ = ["__version__", "LoadedModel", "ModelManager", "evict", "load", "phase", "prefetch", "trace"]


def __getattr__(name: str) -> Any:
    """Import the module that has the public `name` (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ladezeit' has no attribute '{name}'")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
