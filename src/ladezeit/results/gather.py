"""All results below a folder, read so that one damaged file hides no other."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ladezeit.errors import LadezeitError
from ladezeit.result import FILE_NAME, Result, read

_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass
class Gathered:
    """Results by the folder of their sample, and what could not be read with the reason for it."""

    by_folder: dict[Path, Result] = field(default_factory=dict)
    unreadable: dict[Path, str] = field(default_factory=dict)

    @property
    def results(self) -> list[Result]:
        """The results in the order of their jobs."""
        return list(self.by_folder.values())

    @property
    def problems(self) -> list[str]:
        """One line for each file that could not be read."""
        return [f"{path}: {reason}" for path, reason in self.unreadable.items()]


def sample_folders(folder: Path) -> Iterator[Path]:
    """Yield every folder at or below `folder` that holds a sample's ``result.json``, in path order.

    The copies that MLflow keeps below the same outputs folder (``artifacts/<run id>/artifacts``) are no samples.
    """
    for here, folders, files in os.walk(folder):
        folders.sort()
        own = Path(here)
        copy = own.name == "artifacts" and _RUN_ID.fullmatch(own.parent.name)
        if FILE_NAME in files and not copy:
            yield own


def gather(folder: Path) -> Gathered:
    """Read every ``result.json`` at or below `folder`; a file that cannot be read is reported, not fatal.

    Raises:
        LadezeitError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise LadezeitError(f"{folder} is not a folder: give the folder of a sweep or of a single run")
    gathered = Gathered()
    found: list[tuple[Path, Result]] = []
    for sample in sample_folders(folder):
        try:
            found.append((sample, read(sample)))
        except LadezeitError as cause:
            gathered.unreadable[sample / FILE_NAME] = " ".join(str(cause).split())
    found.sort(key=lambda pair: (pair[1].identity.sweep or "", pair[1].identity.job, pair[1].started_at))
    gathered.by_folder = dict(found)
    return gathered
