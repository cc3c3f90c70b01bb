"""The command that measures a whole point again."""

import shlex

from ladezeit.result import Result


def point_command(result: Result, samples: int) -> str:
    """Return the command that measures the point of `result` again, `samples` times, as a sweep."""
    own = [word for word in result.identity.overrides if word.lstrip("+~").partition("=")[0] != "sample"]
    words = [word for word in own if not word.startswith("hydra.")]
    return shlex.join(["ladezeit", "-m", *words, f"sample=range({samples})"])
