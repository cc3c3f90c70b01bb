"""The engine `traced`: a user's own load function, as it is, measured like any other loading method."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from ladezeit.config import LoadingConfig
from ladezeit.errors import CombinationError, ConfigError, LoadError
from ladezeit.loading import instrumentation
from ladezeit.loading.base import EngineModel, EngineSpec, LoadRequest
from ladezeit.loading.device_map import name_places
from ladezeit.loading.registry import check_module
from ladezeit.model.classes import model_class
from ladezeit.model.tensors import fault_in_pages
from ladezeit.timing.clock import Clock, enable_phases


@dataclass
class TracedLoading(LoadingConfig):
    """A user's own load function: ``module:function`` or ``module:Class.method``, importable where the worker runs.

    It is given the checkpoint's folder and, by name, `arguments`.
    """

    engine: str = "traced"
    function: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def check_arguments(self) -> None:
        """Refuse a function that is not named as it has to be; raises `CombinationError`."""
        module, colon, function = (self.function or "").partition(":")
        if not (module and colon and function):
            given = "no function was" if self.function is None else f"loading.function={self.function} was"
            raise CombinationError(
                f"{given} given with loading={self.name}: name your own load function, as "
                f"loading.function=module:function or module:Class.method"
            )

    def check_machine(self) -> None:
        """Refuse a module that is not there to be imported; raises `ConfigError`."""
        if self.function is not None:
            check_module("loading.function", self.function)


#: The loader of a load in this process, which may have no name to be imported by.
_given: ContextVar[Callable[..., Any] | None] = ContextVar("given", default=None)


@contextmanager
def loader_given(function: Callable[..., Any]) -> Iterator[None]:
    """Let the engine use `function` itself, instead of importing it by its name; for loads in this process."""
    token = _given.set(function)
    try:
        yield
    finally:
        _given.reset(token)


class TracedEngine:
    """Calls the user's loader, finds the model in what it returns, and touches what is lazy."""

    def prepare(self, request: LoadRequest[TracedLoading]) -> None:
        """Import the loader's module, off the clock; raises `ConfigError` where there is no such function."""
        loading = request.loading
        assert loading.function is not None  # see `check_arguments`
        self._name = loading.function
        self._modules = instrumentation.user_modules(self._resolve())

    def load(self, request: LoadRequest[TracedLoading], clock: Clock) -> EngineModel:
        """See `Engine.load`."""
        loading = request.loading
        effective: dict[str, Any] = {"function": self._name}
        with ExitStack() as stack:
            function = self._resolve()
            steps = instrumentation.FunctionTrace(clock)
            if clock.detail:
                effective["seams_missing"] = stack.enter_context(
                    instrumentation.install_hooks(clock, model_class(request.checkpoint.config))
                )
                steps = stack.enter_context(instrumentation.trace_functions(clock, function, self._modules))
            stack.enter_context(enable_phases(clock))
            returned = _call(self._resolve(steps.by_function), request, loading.arguments)
        model = model_in(returned, self._name)
        with clock.span("load/touch"):
            effective["touched_bytes"] = fault_in_pages(model)
        paths = {phase.path for phase in clock.phases}
        effective["functions"] = {path: place for path, place in steps.locations.items() if path in paths}
        effective["functions_joined"] = steps.joined
        placed = name_places(getattr(model, "hf_device_map", None))
        return EngineModel(model=model, device_map=placed, effective=effective)

    def _resolve(self, replaced: Mapping[Any, Any] | None = None) -> Callable[..., Any]:
        """Return the loader; where `replaced` has another function for it, that one."""
        given = _given.get()
        function = given if given is not None else import_loader(self._name)
        if inspect.ismethod(function):  # looked up again, because its class may hold another function now
            return getattr(function.__self__, function.__name__, function)
        if isinstance(function, functools.partial):
            inner = (replaced or {}).get(function.func, function.func)
            return functools.partial(inner, *function.args, **function.keywords)
        return (replaced or {}).get(function, function)  # type: ignore[no-any-return]


def import_loader(name: str) -> Callable[..., Any]:
    """Return the function ``module:function``; of ``module:Class.method`` the method of a new object.

    Raises:
        ConfigError: there is no such module or function.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(module)
    except ImportError as cause:
        raise ConfigError(f"loading.function={name} cannot be imported: {cause}") from cause
    for part in path.split("."):
        owner, found = found, getattr(found, part, None)
        if found is None:
            raise ConfigError(f"loading.function={name}: '{getattr(owner, '__name__', owner)}' has no '{part}'")
        if inspect.isclass(owner) and inspect.isfunction(found) and not _is_static(owner, part):
            found = _of_new_object(owner, part)
    if not callable(found):
        raise ConfigError(f"loading.function={name} is a {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]


def _is_static(owner: type, name: str) -> bool:
    return isinstance(inspect.getattr_static(owner, name), staticmethod)


def _of_new_object(owner: type, method: str) -> Callable[..., Any]:
    """Return a function that makes an object and calls its method, so that making it counts as loading."""

    definition = getattr(owner, method)

    @functools.wraps(definition)
    def load(*args: Any, **kwargs: Any) -> Any:
        return getattr(owner(), method)(*args, **kwargs)

    _, *rest = inspect.signature(definition).parameters.values()
    load.__signature__ = inspect.Signature(rest)  # type: ignore[attr-defined]
    return load


def _call(function: Callable[..., Any], request: LoadRequest, arguments: Mapping[str, Any]) -> Any:
    """Call the loader with the checkpoint's folder first, and with what else it has parameters for.

    A parameter named `device` or `dtype` is given the run's; one without parameters is called as it is.
    """
    parameters = inspect.signature(function).parameters
    settled = {*arguments, *getattr(function, "keywords", {})}  # those of a functools.partial
    offered = {"device": request.device, "dtype": request.loading.dtype.value}
    known = {name: value for name, value in offered.items() if name in parameters and name not in settled}
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    first = next(iter(parameters.values()), None)
    takes_folder = first is not None and first.kind in kinds and first.name not in (*known, *settled)
    folder = [str(request.checkpoint.folder)] if takes_folder else []
    return function(*folder, **known, **arguments)


def model_in(returned: Any, name: str) -> Any:
    """Return the model in what a loader returned: itself, one of several things, or an attribute ``model``.

    Raises:
        LoadError: there is no `torch.nn.Module` in it.
    """
    from torch.nn import Module

    several = returned.values() if isinstance(returned, Mapping) else returned
    parts = list(several) if isinstance(several, (tuple, list)) or isinstance(returned, Mapping) else [returned]
    for part in [*parts, getattr(returned, "model", None)]:
        if isinstance(part, Module):
            return part
    raise LoadError(
        f"{name} returned {type(returned).__name__}, in which there is no model: return the transformers model, a "
        f"tuple or dict with it, or an object that has it as .model"
    )


ENGINES = (EngineSpec(name="traced", arguments=TracedLoading, make=TracedEngine, formats=("safetensors", "pickle")),)
