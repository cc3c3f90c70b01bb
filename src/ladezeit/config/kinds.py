"""Which schemas an option file of each group may start from, by the name in its ``defaults``."""

from ladezeit.config.loadings import LOADINGS
from ladezeit.config.models import FolderModel, HubModel, PackagedModel, SyntheticModel
from ladezeit.config.run import (
    CacheConfig,
    InferenceConfig,
    ProcessConfig,
    RuntimeConfig,
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
