"""Where ladezeit keeps what it makes once and uses again: checkpoints, and the locks of devices."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $LADEZEIT_CACHE, else ``ladezeit`` in the user's cache folder."""
    if own := os.environ.get("LADEZEIT_CACHE"):
        return Path(own).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ladezeit"
