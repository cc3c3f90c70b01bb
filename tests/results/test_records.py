import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladezeit.errors import LadezeitError
from ladezeit.results.records import ErrorReport, Identity, Phase, Result, Status, SweepRecord, read_result, save_result
from ladezeit.system.files import write_atomically

DOCUMENTED = [
    "schema_version",
    "status",
    "reason",
    "identity",
    "config",
    "effective",
    "phases",
    "metrics",
    "proof",
    "environment",
    "started_at",
    "error",
]


def example(**changes: object) -> Result:
    fields: dict = {
        "status": Status.ok,
        "identity": Identity("0123456789ab", 2, 7, "cold·transformers·#2", ["cache=cold"], "ladezeit cache=cold"),
        "config": {"model": {"name": "tiny"}},
        "started_at": "2026-11-23T10:00:00.000+00:00",
        "phases": [Phase("load", 0.1, 0.5, 0.2)],
        "metrics": {"load/total_s": 0.5},
    }
    return Result(**(fields | changes))


def test_the_file_has_exactly_the_documented_keys_in_order(tmp_path: Path) -> None:
    """Programs of users read this file; docs/result.md is their contract."""
    plain = json.loads(save_result(example(), tmp_path).read_text())
    assert list(plain) == DOCUMENTED
    documented = (Path(__file__).parents[2] / "docs" / "result.md").read_text()
    assert all(f"| `{key}` |" in documented for key in DOCUMENTED)
    assert all(f"`{status.value}`" in documented for status in Status)


@given(
    status=st.sampled_from(Status),
    reason=st.none() | st.text(),
    metrics=st.dictionaries(st.text(min_size=1), st.floats(allow_nan=False, allow_infinity=False)),
    error=st.none() | st.builds(ErrorReport, st.text(), st.text(), st.text()),
)
def test_what_was_measured_is_read_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, **fields: object) -> None:
    """Nothing measured is lost or changed on its way through the file."""
    result = example(**fields)
    folder = tmp_path_factory.mktemp("sample")
    save_result(result, folder)
    assert read_result(folder) == result


def test_a_metric_that_is_no_number_becomes_null(tmp_path: Path) -> None:
    """The file stays JSON that every parser reads; there is no Infinity in it."""
    text = save_result(example(metrics={"a": math.inf, "b": math.nan, "c": 1.0}), tmp_path).read_text()
    assert json.loads(text)["metrics"] == {"a": None, "b": None, "c": 1.0}
    assert read_result(tmp_path).metrics == {"c": 1.0}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 99}', '{"schema_version": 1, "status": "ok"}'])
def test_a_damaged_or_foreign_file_is_named_not_guessed_at(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(LadezeitError):
        read_result(tmp_path)


def test_a_missing_file_says_that_the_sample_did_not_end(tmp_path: Path) -> None:
    with pytest.raises(LadezeitError, match="did not end"):
        read_result(tmp_path)


def test_a_process_killed_while_writing_leaves_the_old_file_whole(tmp_path: Path) -> None:
    """A power cut or `kill -9` in the middle of writing must not cost an older measurement."""
    save_result(example(reason="old"), tmp_path)
    program = (
        "import os, signal, pathlib, ladezeit.results.records as r\n"
        "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"r.write_atomically(pathlib.Path({str(tmp_path / 'result.json')!r}), 'x' * 10**6)\n"
    )
    died = subprocess.run([sys.executable, "-c", program], check=False)
    assert died.returncode == -9
    assert read_result(tmp_path).reason == "old"


def test_a_full_disk_leaves_no_half_written_file(tmp_path: Path) -> None:
    """/dev/full refuses every byte: the error is raised and nothing new lies in the folder."""
    (tmp_path / f".result.json.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError):
        write_atomically(tmp_path / "result.json", "text")
    assert list(tmp_path.iterdir()) == []


def test_a_sweeps_record_is_found_again_by_a_job_in_another_process(tmp_path: Path) -> None:
    record = SweepRecord("s", "demo", "ladezeit -m", ["cache"], 4, "2026", "host", 1, labels=["a", "b"])
    record.save_record(tmp_path)
    assert SweepRecord.read_record(tmp_path) == record
    with pytest.raises(LadezeitError, match="not the record of a sweep"):
        SweepRecord.read_record(tmp_path / "nowhere")
