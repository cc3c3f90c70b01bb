"""`from_pretrained` without the work that changes nothing where the tensors are there already.

Four things are taken out for the time of a load, each where a release has it: reserving the device's memory a second
time; random numbers for weights on the device `meta`, which have no memory to hold them; expressions for names that
nobody asks for; and a progress bar over tensors that are there. The model is the same, bit for bit, and so are the
random numbers that the process draws afterwards.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ladezeit.loading.late_expressions import late_expressions

#: The library's functions are one for all threads: two loads at once must not put back each other's.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def lean() -> Iterator[None]:
    """Take the idle work out of the library's calls in the block; in one thread at a time."""
    import torch.nn.init
    from transformers import core_model_loading, modeling_utils
    from transformers.utils import logging

    with _ONE_AT_A_TIME, ExitStack() as stack:
        stack.enter_context(late_expressions())
        _replace(stack, modeling_utils, "caching_allocator_warmup", lambda _: lambda *_, **__: None)
        _replace(stack, core_model_loading, "tqdm", lambda bar: getattr(logging, "EmptyTqdm", bar))
        for name in dir(torch.nn.init):
            if name.endswith("_") and not name.startswith("_"):  # torch's name for what writes into its argument
                _replace(stack, torch.nn.init, name, _where_there_is_memory)
        yield


def _where_there_is_memory(initialise: Callable[..., Any]) -> Callable[..., Any]:
    """Return `initialise` for tensors that hold numbers; others are given back as they are."""

    @functools.wraps(initialise)
    def initialised(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor if tensor.is_meta else initialise(tensor, *args, **kwargs)

    return initialised


def _replace(stack: ExitStack, module: Any, name: str, made_of: Callable[[Any], Any]) -> None:
    """Put what `made_of` makes of a module's function in its place until `stack` closes."""
    found = getattr(module, name, None)
    if found is None:  # a release without it has nothing to take out
        return
    setattr(module, name, made_of(found))
    stack.callback(setattr, module, name, found)
