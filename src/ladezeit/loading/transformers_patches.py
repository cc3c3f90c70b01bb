"""transformers' names of weights, without the expressions that nobody uses.

When a process asks for the conversions of its first architecture, the library builds one table of renames and
converters for all of them and compiles each expression of it: 865 in transformers 5.23, which is most of the time the
table takes and a third of a warm load of a small model. Then it compiles one more for every tensor of the checkpoint,
which no tensor that keeps its bytes ever asks. Here it makes the same objects, but an expression is compiled when it is
first asked.
"""

import functools
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from ladezeit.system.fork import renew_after_fork

#: The library's functions are one for all threads: two loads at once must not put back each other's.
_ONE_AT_A_TIME = threading.RLock()
renew_after_fork(_ONE_AT_A_TIME)


#: What undoes the patches of loads under way; a child of a fork has the patches, and not the thread that undoes them.
_PATCHED: list[ExitStack] = []


def _undo_in_child() -> None:
    for stack in reversed(_PATCHED.copy()):
        stack.close()


os.register_at_fork(after_in_child=_undo_in_child)


class LazyPattern:
    """A regular expression that is compiled when it is first used; copied and pickled as the expression it is."""

    __slots__ = ("_compiled", "_flags", "_text")

    def __init__(self, text: str, flags: int = 0) -> None:
        self._text = text
        self._flags = flags
        self._compiled: re.Pattern[str] | None = None

    def __getattr__(self, name: str) -> Any:
        """Return what the compiled expression has under this name."""
        return getattr(self.expression, name)

    @property
    def expression(self) -> re.Pattern[str]:
        """The compiled expression."""
        if self._compiled is None:
            self._compiled = re.compile(self._text, self._flags)
        return self._compiled

    @property
    def is_compiled(self) -> bool:
        """Whether it has been used."""
        return self._compiled is not None

    def __copy__(self) -> "LazyPattern":
        return self

    def __deepcopy__(self, _memo: dict[int, Any]) -> "LazyPattern":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return re.compile, (self._text, self._flags)


@lru_cache(maxsize=512)
def _compiled(pattern: str, flags: int) -> re.Pattern[str]:
    return re.compile(pattern, flags)


def _search(pattern: str, text: str, flags: int = 0) -> re.Match[str] | None:
    return _compiled(pattern, flags).search(text)


def _sub(pattern: str, replacement: Any, text: str, count: int = 0, flags: int = 0) -> str:
    return _compiled(pattern, flags).sub(replacement, text, count)


#: Stands for the module `re`, which looks up slowly what the table asks thousands of times: the same few expressions.
_EXPRESSIONS = SimpleNamespace(**{**vars(re), "compile": LazyPattern, "search": _search, "sub": _sub})


@contextmanager
def lazy_patterns() -> Iterator[None]:
    """Let the library compile its expressions late for the time of the block; what it makes of them stays valid after.

    A release that compiles them elsewhere works as it always does.
    """
    from transformers import core_model_loading

    if getattr(core_model_loading, "re", None) is not re:
        yield
        return
    core_model_loading.re = _EXPRESSIONS
    try:
        yield
    finally:
        core_model_loading.re = re


# `from_pretrained` without the work that changes nothing where the tensors are there already.


@contextmanager
def skip_redundant_init() -> Iterator[None]:
    """Take the idle work out of the library's calls in the block; in one thread at a time."""
    import torch.nn.init
    from transformers import core_model_loading, modeling_utils
    from transformers.utils import logging

    with _ONE_AT_A_TIME, ExitStack() as stack:
        _PATCHED.append(stack)
        stack.callback(_PATCHED.remove, stack)
        stack.enter_context(lazy_patterns())
        _replace(stack, modeling_utils, "caching_allocator_warmup", lambda _: lambda *_, **__: None)
        _replace(stack, core_model_loading, "tqdm", lambda bar: getattr(logging, "EmptyTqdm", bar))
        for name in dir(torch.nn.init):
            if name.endswith("_") and not name.startswith("_"):  # torch's name for what writes into its argument
                _replace(stack, torch.nn.init, name, _where_there_is_memory)
        yield


def _where_there_is_memory(initialize: Callable[..., Any]) -> Callable[..., Any]:
    """Return `initialize` for tensors that hold numbers; others are given back as they are."""

    @functools.wraps(initialize)
    def initialized(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor if tensor.is_meta else initialize(tensor, *args, **kwargs)

    return initialized


def _replace(stack: ExitStack, module: Any, name: str, made_of: Callable[[Any], Any]) -> None:
    """Put what `made_of` makes of a module's function in its place until `stack` closes."""
    found = getattr(module, name, None)
    if found is None:  # a release without it has nothing to take out
        return
    setattr(module, name, made_of(found))
    stack.callback(setattr, module, name, found)
