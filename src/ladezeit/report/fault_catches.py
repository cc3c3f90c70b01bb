"""How many of the bench's planted faults each level of validation finds, as it was measured and packaged."""

import json
from dataclasses import dataclass
from importlib.resources import files

_FILE = "fault_catches.json"


@dataclass(frozen=True)
class Catch:
    """Faults that a level of validation finds, of all that were planted (one at least)."""

    found: int
    of: int


def fault_catches() -> dict[str, Catch]:
    """Return the catch by level of validation; empty where this ladezeit comes without the bench's figures."""
    source = files("ladezeit.report") / _FILE
    if not source.is_file():
        return {}
    levels = json.loads(source.read_text(encoding="utf-8"))["levels"]
    return {level: Catch(int(own["found"]), int(own["of"])) for level, own in levels.items() if int(own["of"]) > 0}
