"""Whether a model speaks as its checkpoint says: stops where it should, with the settings it was published with."""

import json
from pathlib import Path
from typing import Any

from ladezeit.errors import CheckpointError
from ladezeit.validation.proof import Finding

#: Keys of the file that say who wrote it, not how to generate.
_ABOUT_THE_FILE = ("transformers_version", "_from_model_config")


def stored_generation_config(folder: Path) -> dict[str, Any] | None:
    """Return the content of the checkpoint's generation_config.json, None where there is none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / "generation_config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{path} cannot be read: {cause}. Fetch the checkpoint again") from cause
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} holds {type(stored).__name__}, not settings by name. Fetch the checkpoint again")
    return stored


def not_taken_up(model: Any, stored: dict[str, Any] | None) -> list[Finding]:
    """Return a finding where a model that can generate has no generation config, or another one than `stored`.

    Compared are plain values under names that this transformers knows; nested ones become objects of its own.
    """
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return []
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return [Finding("generation_config", "", "the model can generate and has no generation config")]
    differing = [
        f"{key} is {getattr(settings, key)!r}, the checkpoint has {value!r}"
        for key, value in (stored or {}).items()
        if key not in _ABOUT_THE_FILE
        and not isinstance(value, dict)
        and hasattr(settings, key)
        and getattr(settings, key) != value
    ]
    if not differing:
        return []
    return [Finding("generation_config", "", "; ".join(differing))]
