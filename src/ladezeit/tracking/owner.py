"""Which process opened a run, noted as tags, so that a run which nobody will ever close can be told from a live one."""

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

_PREFIX = "ladezeit.process."

#: Where in ``/proc/<pid>/stat``, behind the name in brackets, state and start time stand (proc(5): fields 3 and 22).
_STATE, _START_TIME = 0, 19


class Life(Enum):
    """What is known of the process that opened a run."""

    lives = "lives"
    dead = "dead"
    elsewhere = "elsewhere"  # on another machine, or in another container: it cannot be seen from here


@dataclass(frozen=True)
class Owner:
    """A process, known again after its pid was given to another one.

    `boot` is the kernel's id of this start of the machine, `namespace` the pid namespace's, `started` the process's
    start in clock ticks since boot; `machine` is empty where the system has no id.
    """

    host: str = ""
    machine: str = ""
    boot: str = ""
    namespace: str = ""
    pid: str = ""
    started: str = ""

    @classmethod
    def this_process(cls) -> "Owner":
        """Return the calling process."""
        return cls(
            host=socket.gethostname(),
            machine=_text("/etc/machine-id"),
            boot=_text("/proc/sys/kernel/random/boot_id"),
            namespace=_namespace(),
            pid=str(os.getpid()),
            started=_started(os.getpid()),
        )

    @classmethod
    def of_tags(cls, tags: Mapping[str, str]) -> "Owner | None":
        """Return the process that a run's tags name, None where they name none."""
        known = cls(**{field: tags.get(_PREFIX + field, "") for field in asdict(cls())})
        return known if known.host and known.pid.isdecimal() and known.started else None

    @property
    def tags(self) -> dict[str, str]:
        """The tags to write on a run that this process opens."""
        return {_PREFIX + field: value for field, value in asdict(self).items() if value}

    @property
    def words(self) -> str:
        """The process in words."""
        return f"process {self.pid} on {self.host}"

    def check_life(self) -> Life:
        """Say whether the process still lives, as seen from the calling one; in doubt it is elsewhere."""
        here = Owner.this_process()
        if (self.host, self.machine) != (here.host, here.machine):
            return Life.elsewhere
        if self.boot != here.boot:
            # The same machine after a restart; without an id, it may be another one of the same name.
            return Life.dead if self.machine else Life.elsewhere
        if self.namespace != here.namespace:
            return Life.elsewhere
        return Life.lives if _started(int(self.pid)) == self.started else Life.dead


def _started(pid: int) -> str:
    """Return when the process started, empty where there is none any more (a zombie is none)."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return "" if not fields or fields[_STATE] in ("Z", "X") else fields[_START_TIME]


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
