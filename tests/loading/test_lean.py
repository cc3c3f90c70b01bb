"""What a user loses if this breaks: a load without idle work that still is the library's own load."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import core_model_loading, modeling_utils

from ladezeit.loading.transformers_patches import skip_redundant_init


def test_weights_without_memory_are_given_no_numbers_and_all_others_are() -> None:
    """A thread of the program that makes a model of its own meanwhile gets a model with random weights."""
    torch.manual_seed(7)
    wanted = nn.Linear(64, 64).weight.detach().clone()
    made: list[Any] = []

    def make() -> None:
        torch.manual_seed(7)
        made.append(nn.Linear(64, 64))

    with skip_redundant_init():
        beside = threading.Thread(target=make)
        beside.start()
        beside.join()
        with torch.device("meta"):
            skeleton = nn.Linear(64, 64)
        assert nn.init.uniform_(tensor=skeleton.weight) is skeleton.weight
    assert skeleton.weight.is_meta
    assert torch.equal(made[0].weight, wanted)


def test_the_librarys_functions_are_back_after_an_error() -> None:
    """A load that fails must not change how the program's own models are made and loaded afterwards."""
    functions = [vars(nn.init).copy(), modeling_utils.caching_allocator_warmup, core_model_loading.tqdm]  # type: ignore[attr-defined]
    with pytest.raises(ValueError), skip_redundant_init():
        assert nn.init.normal_ is not functions[0]["normal_"]
        raise ValueError
    assert functions == [vars(nn.init), modeling_utils.caching_allocator_warmup, core_model_loading.tqdm]  # type: ignore[attr-defined]


def test_two_loads_at_once_leave_nothing_of_each_other_behind() -> None:
    """Whichever ends first, the library is as it was once both have ended."""
    before, first_is_in, entered = vars(nn.init).copy(), threading.Event(), []

    def load() -> None:
        first_is_in.wait()
        with skip_redundant_init():
            entered.append("second")

    second = threading.Thread(target=load)
    second.start()
    with skip_redundant_init(), skip_redundant_init():  # a load may open it within itself
        first_is_in.set()
        second.join(0.2)
        entered.append("first")
    second.join()
    assert entered == ["first", "second"]
    assert vars(nn.init) == before


def test_another_release_loads_as_it_always_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library without the functions that are known here has nothing that could be taken out."""
    monkeypatch.delattr(modeling_utils, "caching_allocator_warmup")
    monkeypatch.delattr(core_model_loading, "tqdm")
    with skip_redundant_init():
        assert not hasattr(modeling_utils, "caching_allocator_warmup")
    assert not hasattr(core_model_loading, "tqdm")


_DRAWS = """
import sys, torch, ladezeit
torch.manual_seed(7)
ladezeit.load("tiny", device="cpu", loading=sys.argv[1])
print(torch.rand(3).tolist())
"""


def test_a_load_leaves_the_random_numbers_and_the_terminal_alone(tiny: Any) -> None:
    """A seeded program draws the same numbers after our load as after the library's, and sees no bar over nothing."""

    def ended(loading: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _DRAWS, loading]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(tiny.folder))

    ours, theirs = ended("streamed"), ended("transformers")
    torch.manual_seed(7)
    assert ours.stdout == theirs.stdout == f"{torch.rand(3).tolist()}\n"
    assert "Loading weights" in theirs.stderr and "Loading weights" not in ours.stderr
