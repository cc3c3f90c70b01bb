"""The steps that every load takes, measured by a worker or asked for by a program: both go the same road.

Who calls decides what lies between the steps: a worker verifies the page cache and meters memory, a program frees what
did not pass its verification. Nothing here reads a clock of its own or touches a process-wide setting.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladezeit.config import DType, LoadConfig, LoadingConfig
from ladezeit.config.device_map import single_device
from ladezeit.timing.clock import LOAD, Clock

if TYPE_CHECKING:
    from ladezeit.checkpoint.resolve import Checkpoint
    from ladezeit.loading.base import Conversion, Engine, EngineModel, LoadRequest, Progress
    from ladezeit.validation.expected import Expected
    from ladezeit.validation.references import ReferenceFiles


def make_request(
    config: LoadConfig,
    checkpoint: "Checkpoint",
    device: str,
    scratch: Path,
    *,
    conversion: "Conversion | None" = None,
    progress: "Progress | None" = None,
) -> "LoadRequest":
    """Return what an engine is told: the config's words, and what was found for them on this machine."""
    from ladezeit.loading.base import LoadRequest

    return LoadRequest(
        checkpoint=checkpoint,
        loading=config.loading,
        device=device,
        scratch=scratch,
        attn_implementation=config.runtime.attn_implementation,
        trust_remote_code=config.model.trust_remote_code,
        progress=progress,
        conversion=conversion,
    )


def completion_waiter(loading: LoadingConfig) -> Callable[[str], None]:
    """Return what a clock on a GPU calls at the end of a span: all GPUs are waited for where several may be used.

    On one GPU a phase of the load waits for the stream of its own thread alone: what an engine copies meanwhile on
    another is that engine's to wait for, and a phase that waited for it would slow the load down by being looked at.
    The load as a whole waits for everything.
    """
    import torch

    from ladezeit.timing.resources import synchronize_gpus

    single = single_device(loading)

    def wait(path: str) -> None:
        if not single:
            synchronize_gpus()
        elif path.startswith(f"{LOAD}/"):
            torch.cuda.current_stream().synchronize()
        else:
            torch.cuda.synchronize()

    return wait


def load_model(engine: "Engine", request: "LoadRequest", clock: Clock) -> "EngineModel":
    """Load, inside the span whose duration is ``load/total_s``; `engine` was prepared for `request` before."""
    with clock.span(LOAD):
        return engine.load(request, clock)


def effective_of(loaded: "EngineModel") -> dict[str, Any]:
    """Return what the load came to, as results record it: what the engine says, and what shows in the model."""
    from ladezeit.system.torch_settings import effective_attention
    from ladezeit.validation.placement import offloaded_bytes

    effective = {**loaded.effective, "device_map": loaded.device_map}
    offloaded = offloaded_bytes(loaded)
    if offloaded:
        effective["offloaded_bytes"] = offloaded
    effective["attention"] = effective_attention(loaded.model)
    first = next(loaded.model.parameters())
    effective["dtype"] = str(first.dtype).removeprefix("torch.")
    effective["device"] = str(first.device)
    return effective


def make_expected(
    config: LoadConfig, checkpoint: "Checkpoint", device: str, reference_files: "ReferenceFiles"
) -> "Expected":
    """Return what `config` asks of the loaded model, and have at hand what it is verified with.

    Raises:
        CheckpointError: a reference file is damaged.
    """
    import torch

    from ladezeit.checkpoint.files import brings_adapter
    from ladezeit.loading import quantization
    from ladezeit.model.classes import class_and_config
    from ladezeit.validation import logits, manifest
    from ladezeit.validation.cuda_kernel import device_kernel
    from ladezeit.validation.expected import Expected
    from ladezeit.validation.model_checks import stored_generation_config

    loading = config.loading
    if reference_files.manifest:
        device_kernel(torch.device(device))  # made once: neither the load's time nor the verification's
    return Expected(
        device=device,
        dtype=checkpoint.dtype if loading.dtype is DType.auto else loading.dtype.value,
        single_device=single_device(loading),
        offload_allowed=not loading.disable_cpu_offload,
        quantization=quantization.scheme_asked(loading)
        or (quantization.CHECKPOINTS_OWN if "quantization_config" in checkpoint.config else None),
        generation_config=stored_generation_config(checkpoint.folder),
        manifest=manifest.read_manifest(reference_files.manifest) if reference_files.manifest else None,
        reference=logits.read_reference(reference_files.reference) if reference_files.reference else None,
        model_class=class_and_config(checkpoint.folder, config.model.trust_remote_code)[0],
        adapter=brings_adapter(checkpoint.folder),
    )
