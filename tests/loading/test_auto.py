"""`loading=auto`: the choice is the table's, is told in one line, and the model is the one that transformers loads."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import DType
from ladezeit.errors import NotRunnableError
from ladezeit.loading import registry
from ladezeit.loading.base import LoadRequest
from ladezeit.loading.engines import auto
from ladezeit.loading.engines.auto import AutoLoading
from ladezeit.system import page_cache
from ladezeit.timing.clock import LOAD, Clock

PLAIN = auto.Facts("cpu", "safetensors", "ext4", 1.0, 10**9, 300, True, False, True)


def load(checkpoint: Checkpoint, dtype: DType = DType.auto) -> tuple[Any, Clock]:
    request = LoadRequest(checkpoint, AutoLoading(name="auto", dtype=dtype), "cpu", Path("/nowhere"))
    clock = Clock(time.monotonic_ns())
    engine = registry.make_engine("auto")
    engine.prepare(request)
    with clock.span(LOAD):
        return engine.load(request, clock), clock


@pytest.mark.parametrize("state", ["cold", "warm"])
@pytest.mark.parametrize("dtype", [DType.auto, DType.float16])
def test_the_model_is_that_of_transformers_and_the_choice_is_told(
    state: str, dtype: DType, own_tiny: Checkpoint
) -> None:
    """A user who lets ladezeit choose gets the right weights, and reads in the result what was chosen and why."""
    page_cache.drop_pages(own_tiny.shards) if state == "cold" else page_cache.warm_pages(own_tiny.shards)
    loaded, clock = load(own_tiny, dtype)
    theirs: Any = AutoModelForCausalLM.from_pretrained(own_tiny.folder, dtype=dtype.value)
    mine = loaded.model.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.state_dict().items())
    told = loaded.effective["auto"]
    assert told["engine"] == "streamed"
    assert told["reason"].startswith("streamed, because ") and "\n" not in told["reason"]
    assert ("about 0% is in memory" if state == "cold" else "about 100% is in memory") in told["reason"]
    assert told["facts"]["keeps_dtype"] is (dtype is DType.auto)
    assert "load/choose" in {phase.path for phase in clock.phases}


@pytest.mark.parametrize(
    "facts,engine",
    [
        (PLAIN, "streamed"),
        (replace(PLAIN, resident_share=math.nan), "streamed"),
        (replace(PLAIN, file_format="pickle"), "transformers"),
        (replace(PLAIN, quantised=True), "transformers"),
        (replace(PLAIN, own_class=False), "transformers"),
        (replace(PLAIN, filesystem="nfs4"), "streamed"),
    ],
)
def test_the_table_decides(facts: auto.Facts, engine: str) -> None:
    """What no fast engine can serve is left to transformers instead of failing in one."""
    choice = auto.choose_engine(facts)
    assert choice.engine == engine
    assert auto.rule_table()[choice.rule - 1][2].split()[0] == engine


def test_an_engine_that_cannot_run_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an engine's needs are not met, the next rule decides."""

    def check(name: str, device: str, file_format: str) -> None:
        if name == "streamed":
            raise NotRunnableError("not here")

    monkeypatch.setattr(registry, "check_engine", check)
    assert auto.choose_engine(PLAIN).engine == "transformers"


def test_the_documentation_has_the_table() -> None:
    """What users read is the table that decides."""
    text = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    for number, condition, method, why in auto.rule_table():
        assert f"| {number} | {condition} | `{method}` | {why} |" in text
