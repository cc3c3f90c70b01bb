"""Quantised loads as several tests need them: by engine, on the CPU or a GPU, and their proof by `placement`."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import LoadingConfig, ValidationConfig, ValidationLevel
from ladezeit.config.engines import arguments_class
from ladezeit.loading import registry
from ladezeit.loading.base import EngineModel, LoadRequest
from ladezeit.loading.quantization import scheme_asked
from ladezeit.timing.clock import LOAD, Clock
from ladezeit.validation.expected import Expected
from ladezeit.validation.levels import verify_model
from ladezeit.validation.verification import Verification

#: The engines that quantise, with the package that each needs.
ENGINES = {"bitsandbytes_8bit": "bitsandbytes", "bitsandbytes_4bit": "bitsandbytes", "torchao_int8": "torchao"}
UP = "model.layers.0.mlp.up_proj"


def loading_of(name: str, **arguments: Any) -> LoadingConfig:
    return arguments_class(name)(name=name, engine=name, **arguments)


def load(name: str, checkpoint: Checkpoint, scratch: Path, device: str = "cpu", **arguments: Any) -> EngineModel:
    """Load as a worker does; skips the test where the library is not installed."""
    if name in ENGINES:
        pytest.importorskip(ENGINES[name])
    request = LoadRequest(checkpoint, loading_of(name, **arguments), device, scratch)
    engine = registry.make_engine(name)
    engine.prepare(request)
    clock = Clock(time.monotonic_ns())
    with clock.span(LOAD):
        return engine.load(request, clock)


def scheme(name: str, **arguments: Any) -> str:
    asked = scheme_asked(loading_of(name, **arguments))
    assert asked is not None
    return asked


def proof(loaded: EngineModel, scheme: str | None, device: str = "cpu", dtype: str = "bfloat16") -> Verification:
    asked = Expected(device, dtype, single_device=True, offload_allowed=False, quantization=scheme)
    return verify_model(loaded, asked, ValidationConfig(ValidationLevel.placement), Clock(time.monotonic_ns()))


def linear_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return what the schemes take of a Qwen2-like model: the projections of its layers."""
    return {name: tensor for name, tensor in model.named_parameters() if name.endswith("_proj.weight")}
