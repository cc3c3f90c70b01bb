"""Where ladezeit keeps what it makes once and uses again, files that are there whole or not at all, and file locks."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: How often a process that waits for a lock tries again.
_POLL_S = 0.1


def cache_folder() -> Path:
    """Return $LADEZEIT_CACHE, else ``ladezeit`` in the user's cache folder."""
    if own := os.environ.get("LADEZEIT_CACHE"):
        return Path(own).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ladezeit"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one, whatever dies meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def hold_lock(
    path: Path, on_wait: Callable[[], None] = lambda: None, *, wait: bool = True, shared_by_threads: bool = False
) -> Iterator[None]:
    """Hold the lock file `path`, creating it and its folder where they are missing.

    The kernel gives the lock back when the process dies, whatever it dies of. The file stays: removing one that
    somebody waits on would part them from the next.

    Args:
        path: the lock file; every user who can enter its folder may hold it.
        on_wait: called again and again while another one has it.
        wait: whether to wait at all.
        shared_by_threads: whether all threads of this process hold it together and may enter it again; otherwise they
            exclude each other.

    Raises:
        TimeoutError: another one has it, and `wait` is false.
        OSError: the file cannot be opened, or its file system has no locks.
    """
    from filelock import FileLock

    def give_up() -> bool:
        on_wait()
        return False

    lock = FileLock(
        path, mode=0o666, thread_local=not shared_by_threads, is_singleton=shared_by_threads, fallback_to_soft=False
    )
    with lock.acquire(poll_interval=_POLL_S, blocking=wait, cancel_check=give_up):
        yield
