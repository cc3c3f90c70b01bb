"""The files of a sample that go with its run, copied without credentials."""

import shutil
from pathlib import Path

from ladezeit.result import FILE_NAME, Result
from ladezeit.tracking.credentials import redact
from ladezeit.tracking.projection import PHASES_FILE, phases_table

#: Left in a sample's folder once its run is complete; holds the run's id. A folder without it is in the outbox.
MARKER = ".mlflow_run_id"

TIMELINE_FILE = "timeline.png"
TRACE_FILE = "traceback.txt"

_TEXTS = (FILE_NAME, ".hydra/config.yaml", ".hydra/overrides.yaml", "worker.log", "generated.txt", "findings.json")
#: A profile is of use only whole.
_WHOLE_TEXTS = ("profile.html", "profile.speedscope.json")
_MOST_TEXT_BYTES = 1_000_000


def collect(result: Result, folder: Path, staging: Path) -> set[str]:
    """Copy what there is of a sample's files into `staging` and return the names.

    Texts are copied without credentials, and only their last megabyte (a profile whole); what is missing is
    left out.
    """
    texts = {Path(name).name: folder / name for name in _TEXTS}
    for name, source in texts.items():
        if source.is_file():
            (staging / name).write_text(redact(_end_of(source)), encoding="utf-8")
    for name in _WHOLE_TEXTS:
        if (folder / name).is_file():
            (staging / name).write_text(redact((folder / name).read_text(encoding="utf-8")), encoding="utf-8")
    if (folder / TIMELINE_FILE).is_file():
        shutil.copyfile(folder / TIMELINE_FILE, staging / TIMELINE_FILE)
    if result.error is not None and result.error.trace:
        (staging / TRACE_FILE).write_text(redact(result.error.trace), encoding="utf-8")
    (staging / PHASES_FILE).write_text(phases_table(result.phases), encoding="utf-8")
    return {path.name for path in staging.iterdir()}


def _end_of(source: Path) -> str:
    with source.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _MOST_TEXT_BYTES))
        text = file.read().decode(errors="replace")
    return text if size <= _MOST_TEXT_BYTES else f"… (the last {_MOST_TEXT_BYTES} of {size} bytes)\n{text}"
