"""Load functions as users have them, for `ladezeit.trace` to measure as they are."""

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import ladezeit


def plain(folder: str) -> Any:
    """Return the model; wait in a function of its own, and in a phase that is marked."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    wait(0.3)
    with ladezeit.phase("warm up"):
        time.sleep(0.2)
    return model


def wait(seconds: float) -> None:
    """Take time."""
    time.sleep(seconds)


def asks_for_everything(folder: str, device: str, dtype: str) -> dict[str, Any]:
    """Return a dict; the model is in the dtype and on the device that the run has."""
    assert device == "cpu"
    return {"tokenizer": None, "model": AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))}


def many_short_calls(folder: str) -> Any:
    """Call a function that takes no time again and again."""
    for number in range(5000):
        short(number)
    return AutoModelForCausalLM.from_pretrained(folder)


def short(number: int) -> int:
    """Take no time."""
    return number + 1


def in_threads(folder: str) -> tuple[str, Any]:
    """Load in a thread of its own, as services do."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(plain(folder)))
    thread.start()
    thread.join()
    return "ready", found[0]


def forgets_a_weight(folder: str) -> Any:
    """Return a model that is not the checkpoint's."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    return model


def returns_no_model(folder: str) -> str:
    """Return what is no model."""
    return folder


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate as users do."""

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


class Manager:
    """A manager that is made without arguments, and has its model as an attribute."""

    def __init__(self) -> None:
        self.model: Any = None

    @logged
    def load(self, folder: str) -> "Manager":
        """Load, and return the manager."""
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self.settle()
        return self

    @classmethod
    def settle(cls) -> None:
        """Take time."""
        wait(0.1)
