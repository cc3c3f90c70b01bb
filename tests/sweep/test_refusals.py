"""What is found out before a sample becomes its result: a reason, and whether memory ran out or nothing was tried."""

import json
from pathlib import Path

import pytest

from configs_for_tests import make_run_config
from ladezeit.errors import CheckpointError, LadezeitError, NotRunnableError, OutOfMemoryError
from ladezeit.result import Identity, Status
from ladezeit.sweep.job import not_started
from ladezeit.validation.apart import run_apart


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (NotRunnableError("loading.engine=x needs a GPU"), Status.skipped),
        (CheckpointError("shard 2 is missing"), Status.skipped),
        (OutOfMemoryError("memory ran out in its reference load"), Status.oom),
    ],
)
def test_a_refusal_is_recorded_as_what_it_is(refusal: LadezeitError, status: Status, tmp_path: Path) -> None:
    """A reference load that a full GPU ended is counted with the loads that it ended, not with what makes no sense."""
    result = not_started(make_run_config(tmp_path), Identity("0" * 12, 0, 0, "test", [], "ladezeit"), refusal)
    assert (result.status, result.reason) == (status, str(refusal))


def test_a_reference_load_that_finds_no_memory_is_out_of_memory() -> None:
    """Its process tells by its exit code, whichever library had asked for the memory."""
    with pytest.raises(OutOfMemoryError, match=r"model=tiny: memory ran out in its reference load: .*can't allocate"):
        run_apart("references_for_tests", {"ask_for_bytes": 2**50}, "model=tiny")
    with pytest.raises(CheckpointError, match=r"model=tiny: its reference load failed: .*KeyError"):
        run_apart("references_for_tests", {}, "model=tiny")
    assert json.dumps(run_apart("references_for_tests", {"ask_for_bytes": 1}, "model=tiny")) == '{"had_bytes": 1}'
