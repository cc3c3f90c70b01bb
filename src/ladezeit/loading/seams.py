"""Phases inside `from_pretrained`, found by wrapping the library's own functions while a load runs.

`from_pretrained` is one call; what it spends its time on is visible only where its steps are functions of their own.
Each seam names such a function and the phase it stands for. A seam that a library version does not have is left out
and reported, so that a missing phase is never mistaken for one that took no time.
"""

import functools
import importlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from packaging.version import Version

from ladezeit.measure.clock import Clock


@dataclass(frozen=True)
class Seam:
    """A function of a library by module and attribute path, the phase that it is, and the release it came with."""

    module: str
    attribute: str
    phase: str
    since: str = "0"


#: The steps of `from_pretrained` in transformers 5.17 to 5.24, outermost first.
SEAMS = (
    Seam("transformers.models.auto.auto_factory", "resolve_revision", "load/resolve", since="5.18"),
    Seam("transformers.models.auto.auto_factory", "find_adapter_config_file", "load/resolve"),
    Seam("transformers.models.auto.configuration_auto", "AutoConfig.from_pretrained", "load/config"),
    Seam("transformers.modeling_utils", "resolve_revision", "load/resolve", since="5.18"),
    Seam("transformers.modeling_utils", "maybe_load_adapters", "load/resolve"),
    Seam("transformers.modeling_utils", "_get_resolved_checkpoint_files", "load/resolve"),
    Seam("transformers.modeling_utils", "_get_dtype", "load/config"),
    Seam("transformers.modeling_utils", "get_hf_quantizer", "load/config"),
    Seam("transformers.modeling_utils", "get_model_conversion_mapping", "load/plan"),
    Seam("transformers.modeling_utils", "_get_device_map", "load/plan"),
    Seam("transformers.modeling_utils", "caching_allocator_warmup", "load/allocate"),
    Seam("transformers.modeling_utils", "PreTrainedModel._load_pretrained_model", "load/read"),
    Seam("transformers.modeling_utils", "PreTrainedModel._finalize_model_loading", "load/finalise"),
    Seam("transformers.modeling_utils", "PreTrainedModel.eval", "load/finalise"),
    Seam("transformers.generation.utils", "GenerationMixin.adjust_generation_fn", "load/generation_config"),
    Seam("transformers.modeling_utils", "accelerate_dispatch", "load/dispatch"),
)

#: The constructor of the concrete class builds the skeleton; its class is known only when the config is.
SKELETON = "load/skeleton"


@contextmanager
def observed(clock: Clock, model_class: type, renamed: Mapping[str, str] = MappingProxyType({})) -> Iterator[list[str]]:
    """Wrap all seams, and `model_class`'s constructor, for the time of the block.

    `renamed` gives other names to phases that mean something else in the caller's road.

    Yields:
        The seams that this release of the library should have and does not, as ``module.attribute``.
    """
    from transformers import __version__

    missing: list[str] = []
    with ExitStack() as stack:
        for seam in SEAMS:
            phase = renamed.get(seam.phase, seam.phase)
            if not enter(stack, replace(seam, phase=phase), clock) and Version(__version__) >= Version(seam.since):
                missing.append(f"{seam.module}.{seam.attribute}")
        own = Seam(model_class.__module__, f"{model_class.__qualname__}.__init__", SKELETON)
        if not enter(stack, own, clock):
            missing.append(f"{own.module}.{own.attribute}")
        yield missing


def enter(stack: ExitStack, seam: Seam, clock: Clock) -> bool:
    """Wrap one seam until `stack` closes; return whether this version of the library has the function."""
    owner: Any = importlib.import_module(seam.module)
    *path, name = seam.attribute.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    found = getattr(owner, name, None)
    if owner is None or not callable(found):
        return False
    inherited = isinstance(owner, type) and name not in vars(owner)
    raw = vars(owner).get(name, found) if not inherited else None
    setattr(owner, name, _wrapped(raw if raw is not None else found, seam.phase, clock, owner))
    if inherited:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, raw)
    return True


def _wrapped(function: Any, phase: str, clock: Clock, owner: Any) -> Any:
    """Return `function` inside a span, as the same kind of descriptor that it was."""
    kind = type(function) if isinstance(function, (staticmethod, classmethod)) else None
    inner = function.__func__ if kind is not None else function
    own = threading.get_ident()

    @functools.wraps(inner)
    def timed(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != own:  # another thread of the program loads something else
            return inner(*args, **kwargs)
        with clock.span(phase):
            return inner(*args, **kwargs)

    return kind(timed) if kind is not None else timed
