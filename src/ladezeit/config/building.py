"""Composed config becomes objects here, and nowhere else; each value is checked on the way."""

from dataclasses import fields, is_dataclass
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf

from ladezeit.config.run import RunConfig, TrackingConfig
from ladezeit.errors import ConfigError, did_you_mean


def build(composed: DictConfig) -> RunConfig:
    """Turn a composed config into objects and check each value; `combination.check_combination` looks at them together.

    Raises:
        ConfigError: a key is unknown, or a value is out of its range.
        omegaconf.errors.OmegaConfBaseException: a mandatory value is missing or an interpolation fails.
    """
    _check_keys(composed, "")
    config = OmegaConf.to_object(composed)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            "the composed config is not a ladezeit run: its first default must be '/schema/run' (see conf/config.yaml)"
        )
    check_values(config)
    return config


def check_values(config: RunConfig) -> None:
    """Check each value of `config` by itself; raises `ConfigError`."""
    _check_device(config.device)
    _check_numbers(config)
    _check_no_secret(config.tracking)


def _check_keys(node: DictConfig, path: str) -> None:
    """Refuse keys that were added with ``+`` where no schema knows them: they would change nothing."""
    kind = OmegaConf.get_type(node)
    if not is_dataclass(kind):
        return
    known = [item.name for item in fields(kind)]
    for key in map(str, node):
        if key not in known:
            raise ConfigError(
                f"'{path}{key}' is no key of the config: there are {', '.join(known)}." + did_you_mean(key, known)
            )
        if (
            not OmegaConf.is_missing(node, key)
            and not OmegaConf.is_interpolation(node, key)
            and OmegaConf.is_dict(node[key])
        ):
            _check_keys(node[key], f"{path}{key}.")


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind == "cuda" and (index.isdigit() or (not index and device == "cuda")):
        return
    if device in ("auto", "cpu"):
        return
    raise ConfigError(
        f"device={device} is not a device: use auto, cpu, cuda or cuda:N."
        + did_you_mean(device, ("auto", "cpu", "cuda", "cuda:0"))
    )


def _check_no_secret(tracking: TrackingConfig) -> None:
    if urlsplit(tracking.uri or "").password:
        raise ConfigError(
            "tracking.uri holds a password, and configs are written into results and logs: leave tracking.uri out and "
            "set MLFLOW_TRACKING_URI in the environment instead"
        )


def _check_numbers(config: RunConfig) -> None:
    limits = {
        "sample": (config.sample, 0),
        "validation.k": (config.validation.k, 1),
        "inference.new_tokens": (config.inference.new_tokens, 0),
        "runtime.threads": (config.runtime.threads, 1),
        "process.time_limit_s": (config.process.time_limit_s, 1),
        "loading.ranks": (getattr(config.loading, "ranks", None), 2),
        "loading.threads": (getattr(config.loading, "threads", None), 1),
        "loading.io_depth": (getattr(config.loading, "io_depth", None), 1),
        "loading.threshold": (getattr(config.loading, "threshold", None), 0),
        "loading.buffer_bytes": (getattr(config.loading, "buffer_bytes", None), 4096),
    }
    for key, (value, least) in limits.items():
        if value is not None and value < least:
            raise ConfigError(f"{key}={value} is too small: the least is {least}")
