"""Faults met by whole samples: the installed command, the worker's own process, planting engines as a user's own."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from file_faults import names_of, places_in, plant
from planting import IN_MEMORY, planting

from ladezeit.checkpoint.resolve import Checkpoint, inspect_checkpoint
from ladezeit.validation.faults import Fault

HERE = str(Path(__file__).parent)
TESTS = str(Path(__file__).parents[1])
PLANTED = (
    Fault.flipped_bit,
    Fault.swapped_tensors,
    Fault.missing_tensor,
    Fault.extra_tensor,
    Fault.wrong_shape,
    Fault.buffer_on_meta,
    Fault.untied_head,
    Fault.silent_offload,
    Fault.overwritten_buffer,
)
Ladezeit = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow


def results(outputs: Path) -> list[dict[str, Any]]:
    paths = [path for path in outputs.glob("**/result.json") if path.parent.name != "-1"]
    return [json.loads(path.read_text()) for path in sorted(paths)]


def test_planting_engines_end_wrong_and_by_name(ladezeit: Ladezeit, tmp_path: Path) -> None:
    """Whoever writes an engine of their own is told what it did wrong: status, reason, and the weight."""
    engines = ",".join(planting(fault, "transformers") for fault in PLANTED)
    done = ladezeit(
        "-m", "model=tiny", "loading=transformers", f"loading.engine={engines}", "validation=content", "inference=none",
        "process=prewarmed", "tracking=none", "ceilings=false", "discard_first=false", "device=cpu",
        f"outputs={tmp_path}", PYTHONPATH=f"{HERE}:{TESTS}",
    )  # fmt: skip
    found = {result["config"]["loading"]["engine"]: result for result in results(tmp_path)}
    assert len(found) == len(PLANTED), done.stdout + done.stderr
    for fault in PLANTED:
        result = found[planting(fault, "transformers")]
        assert result["status"] == "wrong", fault
        assert any(name in result["reason"] for name in IN_MEMORY[fault][1]), result["reason"]


@pytest.fixture
def copy(tiny: Checkpoint, tmp_path: Path) -> Checkpoint:
    """A folder of the user's own, which may be damaged."""
    shutil.copytree(tiny.folder, tmp_path / "copy")
    return inspect_checkpoint(tmp_path / "copy", "copy")


def test_a_file_that_rots_after_it_was_proven(ladezeit: Ladezeit, copy: Checkpoint, tmp_path: Path) -> None:
    """A disk that flips a bit makes a proven load wrong; one that loses or adds bytes makes it end before it starts."""
    whole = copy.shards[0].read_bytes()
    times = copy.shards[0].stat()

    def sample(number: int) -> tuple[list[dict[str, Any]], str]:
        outputs = tmp_path / f"outputs-{number}"
        done = ladezeit(
            "model=folder", f"model.path={copy.folder}", "loading=safetensors_mmap", "validation=content",
            "inference=none", "tracking=none", "ceilings=false", "device=cpu", f"outputs={outputs}",
        )  # fmt: skip
        return results(outputs), done.stdout + done.stderr

    found, said = sample(0)
    assert [result["status"] for result in found] == ["ok"], said
    for number, fault in enumerate((Fault.flipped_bit_in_file, Fault.truncated_file, Fault.trailing_bytes), 1):
        plant(fault, copy.shards[0], places_in(copy))
        found, said = sample(number)
        assert all(result["status"] == "wrong" for result in found), said
        assert (fault is Fault.flipped_bit_in_file) == bool(found), said
        told = found[0]["reason"] if found else said.replace("\n", "")
        assert any(name in told for name in names_of(fault, copy)), told
        copy.shards[0].write_bytes(whole)
        os.utime(copy.shards[0], ns=(times.st_atime_ns, times.st_mtime_ns))
