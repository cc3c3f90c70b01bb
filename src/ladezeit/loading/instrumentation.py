"""Phases of a user's own load: each function of their code becomes one, without a change to it.

While the load runs, the functions and methods of the loader's module, and of the modules that lie beside it, are
wrapped; so are the library functions that load weights. A phase's own time is what neither another of these functions
nor a library's phase inside it takes: ``load/my_manager:Manager.check`` is what that method itself costs.
"""

import functools
import importlib
import inspect
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

from packaging.version import Version

from ladezeit.timing.clock import LOAD, Clock

#: A function that was called this often, and is this short, costs more to time than it takes: it joins its caller.
MANY_CALLS = 1000
SHORT_NS = 100_000

_SPECIAL = ("__init__", "__call__", "__enter__", "__exit__")

#: ladezeit may lie beside a loader (its own examples do): it does not time itself.
_NEVER = ("ladezeit", "hydra_plugins")

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})

#: The constructor of the concrete class builds the skeleton; its class is known only when the config is.
SKELETON = "load/skeleton"


# Phases inside `from_pretrained`, found by wrapping the library's own functions while a load runs.


@dataclass(frozen=True)
class Hook:
    """A function of a library by module and attribute path, the phase that it is, and the release it came with."""

    module: str
    attribute: str
    phase: str
    since: str = "0"


#: What a loader calls besides `from_pretrained`, whose own steps are in `ladezeit.loading.instrumentation`.
LIBRARY_HOOKS = (
    Hook("transformers.models.auto.tokenization_auto", "AutoTokenizer.from_pretrained", "load/tokenizer"),
    Hook("transformers.modeling_utils", "PreTrainedModel.to", "load/move"),
    Hook("transformers.modeling_utils", "PreTrainedModel.cuda", "load/move"),
    Hook("transformers.modeling_utils", "PreTrainedModel.half", "load/cast"),
    Hook("transformers.modeling_utils", "PreTrainedModel.float", "load/cast"),
    Hook("transformers.generation.utils", "GenerationMixin.generate", "load/generate"),
    Hook("safetensors.torch", "load_file", "load/read"),
    Hook("torch", "load", "load/read"),
    Hook("torch.nn", "Module.load_state_dict", "load/assign"),
)


@dataclass
class FunctionTrace:
    """What was wrapped: `locations` gives file and line by phase, `joined` the phases left to their callers."""

    clock: Clock
    locations: dict[str, str] = field(default_factory=dict)
    joined: list[str] = field(default_factory=list)
    by_function: dict[Any, Any] = field(default_factory=dict)


@contextmanager
def trace_functions(clock: Clock, function: Callable[..., Any], modules: list[ModuleType]) -> Iterator[FunctionTrace]:
    """Wrap what `modules` define, `function` among it, for the time of the block."""
    steps = FunctionTrace(clock)
    inner = unwrap_function(function)
    with ExitStack() as stack:
        for seam in LIBRARY_HOOKS:
            _enter_library(stack, seam, clock, modules)
        for module in modules:
            for owner, name, raw in _functions(module):
                _enter(stack, steps, owner, name, raw)
        for module in modules:
            _follow_aliases(stack, module, steps.by_function)
        if inner not in steps.by_function and isinstance(inner, FunctionType):
            steps.by_function[inner] = _timed(inner, steps)  # a function that no module holds by its name
        yield steps


def unwrap_function(function: Any) -> Any:
    """Return what has the module and the code of a callable: the function of a method, the class of an object."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(getattr(function, "__func__", function))
    return function if isinstance(function, FunctionType) or inspect.isclass(function) else type(function)


def user_modules(function: Callable[..., Any]) -> list[ModuleType]:
    """Return the imported modules of the code that `function` belongs to: its package, and what lies beside it.

    Takes a while, as does importing the libraries whose functions are looked at: call it before a clock runs.
    """
    for seam in LIBRARY_HOOKS:
        import_module(seam.module)
    home = sys.modules.get(unwrap_function(function).__module__)
    if home is None:
        return []
    top = home.__name__.partition(".")[0]
    file = getattr(sys.modules.get(top, home), "__file__", None) or getattr(home, "__file__", None)
    beside = Path(file).resolve().parent if file and not _installed(file) else None
    found = []
    for name, module in list(sys.modules.items()):
        own = getattr(module, "__file__", None)
        near = beside and own and not _installed(own) and Path(own).resolve().is_relative_to(beside)
        if module is home or name == top or name.startswith(f"{top}.") or near:
            found.append(module)
    return [module for module in found if module.__name__.partition(".")[0] not in _NEVER]


def _installed(file: str) -> bool:
    """Return whether a file is the interpreter's or an installed package's."""
    return file.startswith(_LIBRARIES) or "site-packages" in file


def _functions(module: ModuleType) -> Iterator[tuple[Any, str, Any]]:
    """Yield (owner, name, function) for each function and method that the module's own file defines."""
    for name, value in list(vars(module).items()):
        if inspect.isclass(value) and value.__module__ == module.__name__:
            for inner, raw in list(vars(value).items()):
                if _is_own(getattr(raw, "__func__", raw), module) and (inner[:2] != "__" or inner in _SPECIAL):
                    yield value, inner, raw
        elif _is_own(value, module):
            yield module, name, value


def _is_own(value: Any, module: ModuleType) -> bool:
    if not isinstance(value, FunctionType) or value.__module__ != module.__name__:
        return False
    code = inspect.unwrap(value).__code__
    lazy = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    file = getattr(module, "__file__", None)  # what is typed at a prompt or in a notebook has none
    return file in (None, code.co_filename) and not code.co_flags & lazy


def _enter(stack: ExitStack, steps: FunctionTrace, owner: Any, name: str, raw: Any) -> None:
    kind = type(raw) if isinstance(raw, (staticmethod, classmethod)) else None
    function = raw.__func__ if kind is not None else raw
    if function not in steps.by_function:
        steps.by_function[function] = _timed(function, steps)
    timed = steps.by_function[function]
    setattr(owner, name, kind(timed) if kind is not None else timed)
    stack.callback(setattr, owner, name, raw)


def _timed(function: Any, steps: FunctionTrace) -> Any:
    """Return `function` as a step of the clock; a short one that is called too often joins its caller for good."""
    code = inspect.unwrap(function).__code__
    path = f"{LOAD}/{function.__module__}:{function.__qualname__}"
    steps.locations[path] = f"{code.co_filename}:{code.co_firstlineno}"
    clock, calls = steps.clock, 0

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls < 0 or not clock.begin_step(path):
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        finally:
            clock.end_step()
            calls += 1
            if calls % MANY_CALLS == 0 and clock.duration_s(path) * 1e9 < SHORT_NS * calls:
                calls = -1
                clock.give_back(path)
                steps.joined.append(path)

    return timed


def _enter_library(stack: ExitStack, seam: Hook, clock: Clock, modules: list[ModuleType]) -> None:
    """Wrap a library's function, also where the user's modules hold it by a name of their own."""
    before = _lookup(seam)
    if before is not None and install_hook(stack, seam, clock) and "." not in seam.attribute:
        for module in modules:
            _follow_aliases(stack, module, {before: _lookup(seam)})


def _lookup(seam: Hook) -> Any:
    module = sys.modules.get(seam.module)
    for part in seam.attribute.split("."):
        module = getattr(module, part, None)
    return module


def _follow_aliases(stack: ExitStack, module: ModuleType, replaced: dict[Any, Any]) -> None:
    """Replace functions that `module` imported by name."""
    for name, value in list(vars(module).items()):
        if isinstance(value, FunctionType) and value in replaced:
            setattr(module, name, replaced[value])
            stack.callback(setattr, module, name, value)


#: The steps of `from_pretrained` in transformers 5.17 to 5.24, outermost first.
HOOKS = (
    Hook("transformers.models.auto.auto_factory", "resolve_revision", "load/resolve", since="5.18"),
    Hook("transformers.models.auto.auto_factory", "find_adapter_config_file", "load/resolve"),
    Hook("transformers.models.auto.configuration_auto", "AutoConfig.from_pretrained", "load/config"),
    Hook("transformers.modeling_utils", "resolve_revision", "load/resolve", since="5.18"),
    Hook("transformers.modeling_utils", "maybe_load_adapters", "load/resolve"),
    Hook("transformers.modeling_utils", "_get_resolved_checkpoint_files", "load/resolve"),
    Hook("transformers.modeling_utils", "_get_dtype", "load/config"),
    Hook("transformers.modeling_utils", "get_hf_quantizer", "load/config"),
    Hook("transformers.modeling_utils", "get_model_conversion_mapping", "load/plan"),
    Hook("transformers.modeling_utils", "_get_device_map", "load/plan"),
    Hook("transformers.modeling_utils", "caching_allocator_warmup", "load/allocate"),
    Hook("transformers.modeling_utils", "PreTrainedModel._load_pretrained_model", "load/read"),
    Hook("transformers.modeling_utils", "PreTrainedModel._finalize_model_loading", "load/finalise"),
    Hook("transformers.modeling_utils", "PreTrainedModel.eval", "load/finalise"),
    Hook("transformers.generation.utils", "GenerationMixin.adjust_generation_fn", "load/generation_config"),
    Hook("transformers.modeling_utils", "accelerate_dispatch", "load/dispatch"),
)


@contextmanager
def install_hooks(
    clock: Clock, model_class: type, renamed: Mapping[str, str] = MappingProxyType({})
) -> Iterator[list[str]]:
    """Wrap all seams, and `model_class`'s constructor, for the time of the block.

    `renamed` gives other names to phases that mean something else in the caller's road.

    Yields:
        The seams that this release of the library should have and does not, as ``module.attribute``.
    """
    from transformers import __version__

    missing: list[str] = []
    with ExitStack() as stack:
        for seam in HOOKS:
            phase = renamed.get(seam.phase, seam.phase)
            if not install_hook(stack, replace(seam, phase=phase), clock) and Version(__version__) >= Version(
                seam.since
            ):
                missing.append(f"{seam.module}.{seam.attribute}")
        own = Hook(model_class.__module__, f"{model_class.__qualname__}.__init__", SKELETON)
        if not install_hook(stack, own, clock):
            missing.append(f"{own.module}.{own.attribute}")
        yield missing


def install_hook(stack: ExitStack, seam: Hook, clock: Clock) -> bool:
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
