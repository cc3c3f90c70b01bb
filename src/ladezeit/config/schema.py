"""The option groups, and which schemas an option file of each may start from, by name."""

from ladezeit.config.loading import LOADINGS
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

#: Group -> name -> schema: ``/schema/<group>/<name>@_here_``.
KINDS: dict[str, dict[str, type]] = {
    "model": {
        "hub": HubModel,
        "folder": FolderModel,
        "packaged": PackagedModel,
        "synthetic": SyntheticModel,
    },
    "loading": dict(LOADINGS),
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
