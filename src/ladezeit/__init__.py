"""ladezeit: the fastest correct way to get a Hugging Face language model onto your GPU, found, verified and kept."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public names and the modules that have them, imported at their first use: ``import ladezeit`` alone costs nothing.
_HOMES = {
    "LoadedModel": "ladezeit.serving.load",
    "ModelManager": "ladezeit.serving.manager",
    "ValidationError": "ladezeit.validation.verification",
    "evict": "ladezeit.serving.prefetch",
    "load": "ladezeit.serving.load",
    "phase": "ladezeit.timing.clock",
    "prefetch": "ladezeit.serving.prefetch",
    "trace": "ladezeit.tracing.api",
    "verify": "ladezeit.serving.verify",
}

if TYPE_CHECKING:
    from ladezeit.serving.load import LoadedModel as LoadedModel
    from ladezeit.serving.load import load as load
    from ladezeit.serving.manager import ModelManager as ModelManager
    from ladezeit.serving.prefetch import evict as evict
    from ladezeit.serving.prefetch import prefetch as prefetch
    from ladezeit.serving.verify import verify as verify
    from ladezeit.timing.clock import phase as phase
    from ladezeit.tracing.api import trace as trace
    from ladezeit.validation.verification import ValidationError as ValidationError

__all__ = [
    "LoadedModel",
    "ModelManager",
    "ValidationError",
    "__version__",
    "evict",
    "load",
    "phase",
    "prefetch",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import the module that has the public `name` (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ladezeit' has no attribute '{name}'")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
