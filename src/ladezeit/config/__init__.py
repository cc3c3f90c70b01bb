"""The typed schema of every option group, and the one place that turns composed config into objects.

The option files in ``conf/`` start from these classes (``defaults: [/schema/<group>/<kind>@_here_]``), so Hydra checks
names and types while it composes; `hydra_support` tells it of them, and is not imported here, so that who loads a model
needs no Hydra: `compose` reads the same files without. `build_config` then checks values; `rules` looks at them
together. Enum members are lower case because their names are what users type.
"""

from ladezeit.config.compose import build_config, check_load_values, check_values
from ladezeit.config.loading import STRATEGIES, TensorLoading, TransformersLoading
from ladezeit.config.run import (
    NOT_MEASURED,
    CacheConfig,
    CacheState,
    DType,
    FolderModel,
    HubModel,
    InferenceConfig,
    LoadConfig,
    LoadingConfig,
    MatmulPrecision,
    ModelConfig,
    PackagedModel,
    ProcessConfig,
    ProcessKind,
    RunConfig,
    RuntimeConfig,
    SyntheticModel,
    TrackingConfig,
    TrackingKind,
    ValidationConfig,
    ValidationLevel,
)
from ladezeit.config.serialize import from_plain, to_plain

__all__ = [
    "NOT_MEASURED",
    "STRATEGIES",
    "CacheConfig",
    "CacheState",
    "DType",
    "FolderModel",
    "HubModel",
    "InferenceConfig",
    "LoadConfig",
    "LoadingConfig",
    "MatmulPrecision",
    "ModelConfig",
    "PackagedModel",
    "ProcessConfig",
    "ProcessKind",
    "RunConfig",
    "RuntimeConfig",
    "SyntheticModel",
    "TensorLoading",
    "TrackingConfig",
    "TrackingKind",
    "TransformersLoading",
    "ValidationConfig",
    "ValidationLevel",
    "build_config",
    "check_load_values",
    "check_values",
    "from_plain",
    "to_plain",
]
