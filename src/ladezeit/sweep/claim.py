"""The folder of a run or a sweep belongs to one command: it is claimed before anything is written to it."""

import contextlib
import fcntl
import os
from pathlib import Path

from ladezeit.errors import ConfigError
from ladezeit.results.records import FILE_NAME, SWEEP_FILE_NAME


class FolderClaim:
    """A folder that nobody else writes to while this process lives; made where it was not there.

    The claim is the kernel's lock on the folder itself: it leaves no file behind, whatever the process dies of.

    Raises:
        ConfigError: there are results in it, or another process has claimed it. Nothing in it was changed.
        OSError: it can be neither made nor opened.
    """

    def __init__(self, folder: Path) -> None:
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ConfigError(f"{folder} is in use by another command that measures into it: {_CHOOSE}") from None
        except OSError:
            pass  # a file system without locks: what lies in the folder tells all the same
        for what, found in (
            ("sweep", [folder / SWEEP_FILE_NAME]),
            ("result", [folder / FILE_NAME, *folder.glob(f"*/{FILE_NAME}")]),
        ):
            if any(path.exists() for path in found):
                self.give_back()
                raise ConfigError(f"{folder} holds a {what} already: {_CHOOSE}")

    def give_back(self) -> None:
        """Give the folder back, and remove it, and those above it that were made for it, where nothing is in them."""
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir()
        os.close(self._descriptor)


_CHOOSE = "choose another hydra.run.dir or hydra.sweep.dir, nothing is overwritten"
