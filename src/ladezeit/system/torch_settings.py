"""Process-wide performance settings: set before torch is imported or applied once after, and read back from torch.

Allocator options are those of https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage.
"""

import importlib.metadata
import re
from typing import Any

from ladezeit.config import RuntimeConfig
from ladezeit.errors import ConfigError, did_you_mean
from ladezeit.system.gpus import numbering_variables

#: Options of torch's CUDA caching allocator, as of torch 2.9 to 2.13. Torch itself lets a name it does not know pass.
ALLOCATOR_OPTIONS = (
    "backend",
    "expandable_segments",
    "garbage_collection_threshold",
    "graph_capture_record_stream_reuse",
    "large_segment_size_mb",
    "max_non_split_rounding_mb",
    "max_split_size_mb",
    "per_process_memory_fraction",
    "pinned_max_cached_size_mb",
    "pinned_max_round_threshold_mb",
    "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb",
    "pinned_use_background_threads",
    "pinned_use_cuda_host_register",
    "release_lock_on_cudamalloc",
    "roundup_power2_divisions",
)
#: First torch that reads ``PYTORCH_ALLOC_CONF`` and warns of the old name.
_NEW_ALLOCATOR_NAME_SINCE = (2, 10)
_OPTION = re.compile(r"\s*([a-z0-9_]+)\s*:\s*(\[[^\]]*\]|[^,:;\[\]\s]+)\s*(?:,|$)")


def import_environment(config: RuntimeConfig) -> dict[str, str]:
    """Return the environment variables that must be there before a process imports torch.

    GPUs are numbered as they were when they were looked up and locked; see `ladezeit.system.gpus`.

    Raises:
        ConfigError: `config.allocator` is not what torch's allocator understands.
    """
    variables = numbering_variables()
    if config.threads is not None:
        variables["OMP_NUM_THREADS"] = str(config.threads)
    if config.allocator is not None:
        _check_allocator(config.allocator)
        variables[_allocator_variable()] = config.allocator
    return variables


def apply_settings(config: RuntimeConfig, device: str) -> dict[str, Any]:
    """Apply the settings to this process and return what torch says is in effect.

    `allocator` in the answer is the options string of the CUDA allocator, empty where it has none, and None on the
    CPU, where that allocator has no part and is not asked after.

    Raises:
        ConfigError: a setting did not take effect, because another contradicts it or it came too late.
    """
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.matmul_precision is not None:
        torch.set_float32_matmul_precision(config.matmul_precision.value)
    if config.allow_tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if config.cudnn_benchmark is not None:
        torch.backends.cudnn.benchmark = config.cudnn_benchmark
    effective = _effective(device)
    _compare(config, effective)
    return effective


def effective_attention(model: Any) -> str:
    """Return the attention implementation that `model` runs; where its parts differ, ``part=name`` for each.

    A model that does not say (its class has only one) answers ``unknown``.
    """
    config = model.config
    own = getattr(config, "_attn_implementation", None)
    parts = {"": own} if own else {}
    for part in getattr(config, "sub_configs", {}):
        name = getattr(getattr(config, part, None), "_attn_implementation", None)
        if name:
            parts[part] = name
    names = set(parts.values())
    if len(names) <= 1:
        return next(iter(names), "unknown")
    return ", ".join(f"{part}={name}" if part else name for part, name in parts.items())


def _effective(device: str) -> dict[str, Any]:
    import torch

    return {
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "allocator": _effective_allocator() if device.startswith("cuda") else None,
    }


def _effective_allocator() -> str:
    """Ask torch for the options string that it parsed; torch without that question is asked through its snapshot."""
    import torch

    ask = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if ask is not None:
        return str(ask())
    settings: dict[str, Any] = torch.cuda.memory._snapshot()["allocator_settings"]
    return str(settings.get("PYTORCH_CUDA_ALLOC_CONF") or settings.get("PYTORCH_ALLOC_CONF") or "")


def _compare(config: RuntimeConfig, effective: dict[str, Any]) -> None:
    asked: dict[str, Any] = {
        "threads": config.threads,
        "matmul_precision": config.matmul_precision.value if config.matmul_precision else None,
        "allow_tf32": config.allow_tf32,
        "cudnn_benchmark": config.cudnn_benchmark,
        "allocator": config.allocator if effective["allocator"] is not None else None,
    }
    for key, value in asked.items():
        if value is not None and effective[key] != value:
            raise ConfigError(
                f"runtime.{key}={value} was asked for, torch has {effective[key]!r} in effect. {_cure(key, config)}"
            )


def _cure(key: str, config: RuntimeConfig) -> str:
    if key in ("matmul_precision", "allow_tf32") and config.allow_tf32 is not None:
        return (
            "runtime.matmul_precision and runtime.allow_tf32 set the same switch (highest: no TF32; high, medium: "
            "TF32): give one of the two, or make them agree"
        )
    if key == "allocator":
        return "It is read when torch is imported, so the process must start with it: use process=fresh or prewarmed"
    return "Something else in this process set it: use process=fresh"


def _check_allocator(text: str) -> None:
    position = 0
    while position < len(text):
        option = _OPTION.match(text, position)
        if option is None:
            raise ConfigError(
                f"runtime.allocator={text} is not a list of options from '{text[position:]}' on: write name:value, "
                f"with commas between, such as expandable_segments:True"
            )
        if option.group(1) not in ALLOCATOR_OPTIONS:
            raise ConfigError(
                f"runtime.allocator has the option '{option.group(1)}', which torch's allocator does not know."
                f"{did_you_mean(option.group(1), ALLOCATOR_OPTIONS)} Valid: {', '.join(ALLOCATOR_OPTIONS)}"
            )
        position = option.end()


def _allocator_variable() -> str:
    major, minor = importlib.metadata.version("torch").split(".")[:2]
    new = (int(major), int(minor)) >= _NEW_ALLOCATOR_NAME_SINCE
    return "PYTORCH_ALLOC_CONF" if new else "PYTORCH_CUDA_ALLOC_CONF"
