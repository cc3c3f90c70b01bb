"""How a manager loads: by `ladezeit.load`'s own road, with what its settings say of each model."""

from dataclasses import replace

from ladezeit.cache_folder import cache_folder
from ladezeit.checkpoint.resolve import Checkpoint, prepare
from ladezeit.config import DType, LoadingConfig, RunConfig, RuntimeConfig, TransformersLoading
from ladezeit.errors import ConfigError
from ladezeit.loading import placement
from ladezeit.measure.devices import ResolvedDevice, resolve_device
from ladezeit.plan import weights_bytes
from ladezeit.serving.asked import Asked, config_of, loading_of
from ladezeit.serving.budget import Bytes
from ladezeit.serving.load import load_as_configured
from ladezeit.serving.loaded import LoadedModel
from ladezeit.serving.settings import ManagerSettings, ModelSettings


class InProcessLoader:
    """Loads in this process; see `Loader`. Performance settings are the manager's: a load applies none again."""

    def __init__(self, settings: ManagerSettings) -> None:
        self.runtime = settings.runtime if settings.runtime is not None else _agreed(settings)

    def needs(self, settings: ModelSettings) -> Bytes:
        """See `Loader.needs`; a model that is not on this machine is made, converted or downloaded first."""
        config, device = self._config(settings)
        return _needs(config, device, prepare(config.model, cache_folder()))

    def load(self, settings: ModelSettings) -> LoadedModel:
        """See `Loader.load`."""
        config, device = self._config(settings)
        return load_as_configured(config, "profile" if settings.profile is not None else "loading", device)

    def _config(self, settings: ModelSettings) -> tuple[RunConfig, ResolvedDevice]:
        device = resolve_device(settings.device)
        config, _ = config_of(_asked(settings), device)
        attention = self.runtime.attn_implementation
        model = replace(config.model, name=settings.name)
        return replace(config, model=model, runtime=RuntimeConfig(attn_implementation=attention)), device


def _asked(settings: ModelSettings) -> Asked:
    return Asked(
        settings.source,
        loading=None if settings.profile is not None else _loading(settings),
        profile=settings.profile,
        validation=settings.validation,
        max_memory=settings.max_memory,
        allow_offload=settings.allow_offload,
    )


def _loading(settings: ModelSettings) -> LoadingConfig:
    """Return the method: an option with the dtype that was asked for, or what the arguments say."""
    if settings.method is None:
        return loading_of(settings.arguments)
    found = loading_of(settings.method)
    dtype = settings.arguments.get("dtype")
    return found if dtype is None else replace(found, dtype=DType[dtype])


def _needs(config: RunConfig, device: ResolvedDevice, checkpoint: Checkpoint) -> Bytes:
    """Return the bytes by place; what may be offloaded counts on the GPUs as far as its budget there goes."""
    loading = config.loading
    weights = weights_bytes(loading, checkpoint.weight_bytes, checkpoint.dtype)
    if device.gpu is None:
        return Bytes(host=weights)
    if loading.disable_cpu_offload or not isinstance(loading, TransformersLoading):
        return Bytes(gpu=weights)
    budget = placement.max_memory(loading, device.name) or {}
    on_gpus = sum(size for place, size in budget.items() if isinstance(place, int))
    gpu = min(weights, on_gpus) if on_gpus else weights
    return Bytes(gpu=gpu, host=weights - gpu)


def _agreed(settings: ManagerSettings) -> RuntimeConfig:
    """Return the performance settings that all models of a profile were measured with; a process has them once."""
    first: tuple[str, RuntimeConfig] | None = None
    for name, model in settings.models.items():
        found = config_of(_asked(model), resolve_device(model.device))[0].runtime
        if first is not None and found != first[1]:
            raise ConfigError(
                f"the profile has {name} measured with {found}, and {first[0]} with {first[1]}: a process has one set "
                f"of performance settings. Measure both with the same, or serve them from two processes"
            )
        first = first or (name, found)
    return first[1] if first is not None else RuntimeConfig()
