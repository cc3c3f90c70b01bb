"""Where ladezeit keeps what it makes once and uses again, and files that are there whole or not at all."""

import os
from pathlib import Path


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
