"""Makes ready what a validation level needs before any sample: the manifest of contents, the reference of logits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import DType, RunConfig
from ladezeit.validation import NEED_MANIFEST, NEED_REFERENCE
from ladezeit.validation.content.reference import manifest_file
from ladezeit.validation.logits.reference import reference_file


@dataclass(frozen=True)
class ProofFiles:
    """The files that a sample is proven by; None where its level needs none."""

    manifest: Path | None = None
    reference: Path | None = None


def prepare(
    config: RunConfig,
    checkpoint: Checkpoint,
    *,
    device: str,
    hardware: str,
    cache: Path,
    building: Callable[[str], None] = lambda what: None,
) -> ProofFiles:
    """Return the files for the config's level, made where they are not there for this checkpoint as it is now.

    Args:
        config: names level, dtype and runtime settings.
        checkpoint: what will be loaded.
        device: torch's name of the run's device.
        hardware: the product's name.
        cache: ladezeit's cache folder.
        building: told what is being made; that takes as long as a load or two.

    Raises:
        CheckpointError: the checkpoint's files are damaged, or its reference load failed.
        NotRunnableError: its reference load does not fit this machine.
    """
    asked = config.loading.dtype
    dtype = checkpoint.dtype if asked is DType.auto else asked.value
    trust = config.model.trust_remote_code
    manifest = reference = None
    if config.validation.level in NEED_MANIFEST:
        manifest = manifest_file(
            checkpoint,
            name=config.model.name,
            dtype=dtype,
            device=device,
            cache=cache,
            trust_remote_code=trust,
            building=lambda: building("a reference load, to know what every tensor must hold"),
        )
    if config.validation.level in NEED_REFERENCE:
        reference = reference_file(
            checkpoint,
            name=config.model.name,
            dtype=dtype,
            device=device,
            hardware=hardware,
            runtime=config.runtime,
            cache=cache,
            trust_remote_code=trust,
            building=lambda: building("two reference loads, to know what the model must say"),
        )
    return ProofFiles(manifest, reference)
