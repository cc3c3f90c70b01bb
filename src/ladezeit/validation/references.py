"""Makes ready what a validation level needs before any sample: the manifest of contents, the reference of logits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import DType, LoadConfig, ValidationLevel
from ladezeit.loading.quantization import loading_scheme
from ladezeit.validation.logits import reference_file
from ladezeit.validation.manifest import manifest_file
from ladezeit.validation.reference_cache import ReferenceKey

#: Levels that hold contents against a manifest, and those that hold what the model says against a reference.
NEED_MANIFEST = (ValidationLevel.content, ValidationLevel.full)
NEED_REFERENCE = (ValidationLevel.logits, ValidationLevel.full)


@dataclass(frozen=True)
class ReferenceFiles:
    """The files that a sample is verified by; None where its level needs none."""

    manifest: Path | None = None
    reference: Path | None = None


def reference_key_of(
    config: LoadConfig, checkpoint: Checkpoint, *, device: str, hardware: str, cache: Path
) -> ReferenceKey:
    """Return what the config's references are made for; arguments as those of `ReferenceKey`."""
    asked, loading = config.loading.dtype, config.loading
    return ReferenceKey(
        checkpoint=checkpoint,
        name=config.model.name,
        dtype=checkpoint.dtype if asked is DType.auto else asked.value,
        device=device,
        cache=cache,
        hardware=hardware,
        trust_remote_code=config.model.trust_remote_code,
        scheme=loading_scheme(loading),
        ranks=loading.process_count if loading.process_count > 1 else None,
    )


def prepare_references(
    config: LoadConfig, subject: ReferenceKey, building: Callable[[str], None] = lambda what: None
) -> ReferenceFiles:
    """Return the files for the config's level, made where they are not there for the checkpoint as it is now.

    `building` is told what is being made; that takes as long as a load or two.

    Raises:
        CheckpointError: the checkpoint's files are damaged, or its reference load failed.
        NotRunnableError: its reference load does not fit this machine.
    """
    manifest = reference = None
    if config.validation.level in NEED_MANIFEST:
        quantized = "" if subject.scheme is None else f", quantized by {subject.scheme.library}"
        what = f"a reference load, to know what every tensor must hold{quantized}"
        manifest = manifest_file(subject, lambda: building(what))
    if config.validation.level in NEED_REFERENCE:
        what_said = "two reference loads, to know what the model must generate"
        reference = reference_file(subject, config.runtime, lambda: building(what_said))
    return ReferenceFiles(manifest, reference)
