"""`verify`: a `transformers` model that is in memory already, whoever loaded it, against a checkpoint."""

import os
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladezeit.checkpoint.cache import Progress
from ladezeit.checkpoint.resolve import prepare_checkpoint
from ladezeit.config import (
    LoadConfig,
    LoadingConfig,
    ModelConfig,
    RuntimeConfig,
    TransformersLoading,
    ValidationConfig,
)
from ladezeit.config import ValidationLevel as Level
from ladezeit.errors import ConfigError, NotRunnableError
from ladezeit.serving.load import LoadedModel, expected_of
from ladezeit.serving.request import dtype_of, level_of, model_of
from ladezeit.system.files import cache_folder
from ladezeit.system.gpus import resolve_device
from ladezeit.timing.clock import Clock

if TYPE_CHECKING:
    from ladezeit.validation.verification import Verification

_CPU = "cpu"


def verify(
    model: Any,
    checkpoint: str | os.PathLike[str] | ModelConfig,
    *,
    level: str = "content",
    dtype: str = "auto",
    device: str | None = None,
    progress: Progress | None = None,
    config_dir: str | os.PathLike[str] | None = None,
) -> "Verification":
    """Check whether a model in memory is what plain `from_pretrained` makes of a checkpoint; changes nothing in it.

    Differences are ``findings``, never errors: ask ``passed``. Costs milliseconds for ``placement``, one pass over the
    weights for ``content``, some forward passes for ``logits``; the first time for a checkpoint and dtype also the
    reference load that the last two rest on, in a process of its own, whose result is kept.

    Args:
        model: a `transformers` model, whoever loaded it, or what `ladezeit.load` returned.
        checkpoint: what it was loaded from: a configured name, a folder, or a hub id, as for `ladezeit.load`.
        level: ``placement`` (device, dtype, ties, generation config), ``content`` (all that, and every bit), ``logits``
            (what it generates), ``full`` (all of it).
        dtype: what its weights must be (``bfloat16``, ``float16``, ``float32``); ``auto`` is the checkpoint's own.
        device: where all its weights must be (``cpu``, ``cuda:0``); None lets them be where they are, offloaded
            ones included.
        progress: told what is being made, in the form of `ladezeit.load`.
        config_dir: a folder of your own options, as Hydra's ``--config-dir`` takes it.

    Raises:
        ConfigError: an argument means nothing; `model` is no transformers model.
        CheckpointError: the checkpoint is unavailable or damaged, or its reference load failed.
        NotRunnableError: no such device, the reference load does not fit this machine, or the model was quantized by a
            library that has no reference load here.
    """
    from ladezeit.loading.base import EngineModel
    from ladezeit.validation.levels import verify_loaded

    clock = Clock(time.monotonic_ns())
    on_progress: Progress = progress or (lambda what, done, total: None)
    found = model.model if isinstance(model, LoadedModel) else model
    places = _places(found)
    loading = replace(_loading_of(found), dtype=dtype_of(dtype), disable_cpu_offload=device is not None)
    config = LoadConfig(
        model=model_of(checkpoint, Path(config_dir).expanduser() if config_dir is not None else None),
        loading=loading,
        validation=ValidationConfig(_level_of(level)),
        runtime=RuntimeConfig(),
        device=device or next((place for place in places if place != _CPU), _CPU),
    )
    resolved = resolve_device(config.device)
    stored = prepare_checkpoint(config.model, cache_folder(), on_progress)
    wanted = expected_of(config, stored, resolved, clock, on_progress)
    anywhere = device is None and places != [resolved.name]
    wanted = replace(wanted, single_device=not anywhere, offload_allowed=device is None)
    return verify_loaded(EngineModel(found), wanted, config.validation, clock)


def _places(model: Any) -> list[str]:
    """Return the devices of a model's tensors by torch's names, meta left out; raises `ConfigError` for no model."""
    from transformers import PreTrainedModel

    from ladezeit.model.tensors import component_tensors

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"verify() takes a transformers model (PreTrainedModel) or what ladezeit.load returned, and got "
            f"{type(model).__module__}.{type(model).__qualname__}: pass the model that a wrapper is made around "
            f"(peft: get_base_model() after unload(); torch.compile: _orig_mod)"
        )
    tensors = [*model.parameters(), *model.buffers()]
    places = dict.fromkeys(str(part.device) for tensor in tensors for part in component_tensors(tensor))
    return [place for place in places if place != "meta"] or [_CPU]


def _level_of(requested: str) -> Level:
    level = level_of(requested)
    if level not in (Level.placement, Level.content, Level.logits, Level.full):
        raise ConfigError(
            f"level={requested} verifies nothing of a model that was loaded elsewhere: use placement, content, logits "
            f"or full"
        )
    return level


def _loading_of(model: Any) -> LoadingConfig:
    """Return a loading method that makes such weights: plain, or by the quantizer that they show.

    Raises:
        NotRunnableError: another quantizer made them.
    """
    from ladezeit.loading.engines.quantized import (
        Bitsandbytes4bitLoading,
        Bitsandbytes8bitLoading,
        FourBitType,
        TorchaoInt8Loading,
    )
    from ladezeit.loading.quantization import survey_quantization

    plain = TransformersLoading(name="verify")
    schemes = survey_quantization(model).schemes
    by_checkpoint = getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False)
    if not schemes or by_checkpoint:
        return plain
    known = [
        Bitsandbytes8bitLoading(name="verify"),
        TorchaoInt8Loading(name="verify"),
        *(
            Bitsandbytes4bitLoading(name="verify", quant_type=kind, double_quant=double)
            for kind, double in product(FourBitType, (False, True))
        ),
    ]
    for loading in known:
        if schemes == {loading.scheme.words}:
            return loading
    raise NotRunnableError(
        f"the model was quantized at its load ({', '.join(sorted(schemes))}), which no reference load here repeats: "
        f"verify() knows bitsandbytes' 8 and 4 bit and torchao's int8 weights. Verify the plain model instead"
    )
