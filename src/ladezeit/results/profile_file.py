"""The file of a loading profile, read and checked: the YAML that a verdict writes, or the origin case's JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ladezeit.errors import ConfigError

SCHEMA_VERSION = 1


def read_models(path: Path, told: str) -> Mapping[str, Any]:
    """Return what a file says of each model: a list of entries (YAML), or a mapping (the origin's form).

    Args:
        path: of the profile.
        told: what errors call it.

    Raises:
        ConfigError: it cannot be read, or is no profile of this version.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except (OSError, ValueError) as cause:
        raise ConfigError(f"{told} cannot be read as a loading profile: {cause}") from cause
    return models_of(document, told)


def models_of(document: Any, told: str) -> Mapping[str, Any]:
    """Return the models of a profile that was parsed already; raises as `read_models` does."""
    if isinstance(document, Mapping) and "schema_version" in document:
        if document["schema_version"] != SCHEMA_VERSION or not isinstance(document.get("models"), Mapping):
            raise ConfigError(
                f"{told} is no loading profile of version {SCHEMA_VERSION}: its schema_version is "
                f"{document['schema_version']!r}. Write it again with: ladezeit-results verdict --write-profile"
            )
        models: Mapping[str, Any] = document["models"]
        return models
    if isinstance(document, Mapping) and document and all(is_origin(entry) for entry in document.values()):
        return document
    raise ConfigError(
        f"{told} is no loading profile: neither what ladezeit-results verdict writes (schema_version, models) nor "
        f'{{"model": {{"loading": {{…}}}}}}'
    )


def is_origin(entry: Any) -> bool:
    """Whether a model's entry has the origin's form."""
    return isinstance(entry, Mapping) and isinstance(entry.get("loading"), Mapping)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as cause:
        raise ValueError(str(cause)) from cause
