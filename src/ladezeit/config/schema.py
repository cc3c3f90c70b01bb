"""The option groups, and which schemas an option file of each may start from, by name."""

from ladezeit.config.engines import find_engines
from ladezeit.config.run import (
    CacheConfig,
    FolderModel,
    HubModel,
    InferenceConfig,
    PackagedModel,
    ProcessConfig,
    RuntimeConfig,
    SyntheticModel,
    TrackingConfig,
    ValidationConfig,
)

_SCHEMAS: dict[str, dict[str, type]] = {
    "model": {
        "hub": HubModel,
        "folder": FolderModel,
        "packaged": PackagedModel,
        "synthetic": SyntheticModel,
    },
    "loading": {},  # one for each engine
    "validation": {"base": ValidationConfig},
    "cache": {"base": CacheConfig},
    "inference": {"base": InferenceConfig},
    "runtime": {"base": RuntimeConfig},
    "process": {"base": ProcessConfig},
    "tracking": {"base": TrackingConfig},
}

GROUPS = {
    "model": "which checkpoint is loaded",
    "loading": "by which engine and with which arguments",
    "validation": "what is verified after the load",
    "cache": "the page cache's state when the load starts, set and verified",
    "inference": "the tokens generated after the load",
    "runtime": "process-wide performance settings",
    "process": "what the measured process has done before its clock starts",
    "tracking": "where runs are logged",
    "experiment": "ready-made sweeps",
}


def schema_groups() -> list[str]:
    """Return the groups whose option files start from a schema."""
    return list(_SCHEMAS)


def schemas_of(group: str) -> dict[str, type]:
    """Return the schemas of `group` by name: ``/schema/<group>/<name>@_here_``; those of `loading` by their engine."""
    if group == "loading":
        return {name: facts.arguments for name, facts in find_engines().items()}
    return _SCHEMAS.get(group, {})
