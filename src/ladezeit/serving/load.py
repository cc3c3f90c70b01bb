"""`load`: a Hugging Face language model in this process, by the measured best method, proven before it is returned."""

import contextlib
import gc
import os
import shutil
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladezeit.cache_folder import cache_folder
from ladezeit.checkpoint.resolve import Checkpoint, Progress, prepare
from ladezeit.config import LoadingConfig, ModelConfig, RunConfig, RuntimeConfig, TransformersLoading
from ladezeit.errors import OutOfMemoryError, ValidationError, ran_out_of_memory
from ladezeit.measure.clock import Clock
from ladezeit.measure.devices import ResolvedDevice, resolve_device
from ladezeit.sample import load_steps
from ladezeit.serving.asked import Asked, config_of
from ladezeit.serving.holding import give_back
from ladezeit.serving.loaded import LoadedModel

if TYPE_CHECKING:
    from ladezeit.loading.base import EngineModel, LoadRequest
    from ladezeit.validation import Proof

#: Engines set variables of the process and wrap functions of the library while they load, and two loads at once would
#: only share the disk.
_ONE_LOAD = threading.RLock()


def load(
    model: str | os.PathLike[str] | ModelConfig,
    *,
    device: str = "auto",
    profile: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    loading: str | Mapping[str, Any] | LoadingConfig | None = None,
    validation: str = "placement",
    max_memory: Mapping[Any, Any] | None = None,
    allow_offload: bool = False,
    progress: Progress | None = None,
    config_dir: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Load a model, prove it, and return it; may be called from any thread, and loads are done one after another.

    Args:
        model: a configured name, a folder, or a hub id: ``org/name``, better ``org/name@revision``. Code of a
            checkpoint is not run, unless a configured model says ``trust_remote_code``.
        device: ``auto`` (the first GPU, the CPU where there is none), ``cpu``, ``cuda`` or ``cuda:N``.
        profile: a loading profile, as `ladezeit-results verdict` writes it, or its content: the method for this model.
        loading: the name of an option in ``conf/loading`` or its arguments; goes before the profile. Without either
            `auto` chooses.
        validation: what is proven before the model is returned: ``placement`` (milliseconds), ``content`` (every bit,
            against a manifest that is made at the first load and kept), ``logits``, ``full``, or ``none``.
        max_memory: what a strategy (``loading="device_map_auto"``) may fill: place to size (``20GiB``) or share.
        allow_offload: whether weights may stay off the device; without, that is an error.
        progress: told what is being done, bytes done and bytes in all (0 where that is not known), from any thread.
        config_dir: a folder of your own options, as Hydra's ``--config-dir`` takes it.

    Raises:
        ConfigError: a name or value means nothing, or values do not go together.
        CheckpointError: the checkpoint cannot be had, is damaged, or not safe to read.
        NotRunnableError: no such device, a package is missing, or the model does not fit; nothing was read.
        OutOfMemoryError: memory of the device or of the host ran out; what was loaded is let go.
        LoadError: the load did not end with the model that was asked for.
        ValidationError: it did not pass its proof; its memory is free again.
    """
    clock = Clock(time.monotonic_ns(), notify=lambda path: progress(path, 0, 0) if progress else None)
    with clock.span("config"):
        found = resolve_device(device)
        own = Path(config_dir).expanduser() if config_dir is not None else None
        asked = Asked(model, loading, profile, validation, max_memory, allow_offload, own)
        config, chosen_by = config_of(asked, found)
    return _Load(config, chosen_by, found, clock, progress).run()


def load_as_configured(config: RunConfig, chosen_by: str, device: ResolvedDevice) -> LoadedModel:
    """Load what a config says that was checked already (see `config_of`); raises as `load` does."""
    return _Load(config, chosen_by, device, Clock(time.monotonic_ns()), lambda what, done, total: None).run()


class _Load:
    """One load under way."""

    def __init__(
        self, config: RunConfig, chosen_by: str, device: ResolvedDevice, clock: Clock, progress: Progress | None
    ) -> None:
        self.config = config
        self.chosen_by = chosen_by
        self.device = device
        self.clock = clock
        self.progress: Progress = progress or (lambda what, done, total: None)
        self._reading = None if progress is None else lambda done, total, seconds: progress("load/read", done, total)
        self.effective: dict[str, Any] = {}

    def run(self) -> LoadedModel:
        with self.clock.span("checkpoint"):
            checkpoint = prepare(self.config.model, cache_folder(), self.progress)
        self._import(checkpoint)
        scratch = Path(tempfile.mkdtemp(prefix="ladezeit-"))
        try:
            with self._freed_on_error(), self._on_device():
                made = self._make(checkpoint, scratch)
        except BaseException:
            self._remove(scratch)
            raise
        if self._keeps_files(made):
            weakref.finalize(made.model, self._remove, scratch)
        else:
            self._remove(scratch)
        return made

    def _import(self, checkpoint: Checkpoint) -> None:
        with self.clock.span("import"):
            from ladezeit import validation  # noqa: F401  # needed later, and counted here
            from ladezeit.loading import registry  # noqa: F401
            from ladezeit.loading.model_class import model_class

            model_class(checkpoint.config)

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Make the run's GPU the current one for the time of the load; the caller's own comes back afterwards."""
        if self.device.name == "cpu":
            yield
            return
        import torch

        with torch.cuda.device(self.device.name):
            with self.clock.span("cuda_context"):
                torch.zeros(1, device=self.device.name)
                torch.cuda.synchronize()
            self.device = resolve_device(self.device.name)  # only now torch tells which of the GPUs that is
            self.clock.synchronise = load_steps.waits_for(self.config.loading)
            yield

    @contextlib.contextmanager
    def _freed_on_error(self) -> Iterator[None]:
        """Let go of what a failed load brought into memory: an error that somebody keeps would keep it too."""
        try:
            yield
        except BaseException as error:
            _clear(error)
            gc.collect()
            give_back()
            if isinstance(error, Exception) and ran_out_of_memory(error) and not isinstance(error, OutOfMemoryError):
                raise self._too_large(error) from error
            raise

    def _too_large(self, error: Exception) -> OutOfMemoryError:
        said = str(error).strip().split("\n")[0] or type(error).__name__
        return OutOfMemoryError(
            f"memory ran out while {self.config.model.name} was loaded by {self.config.loading.name} to "
            f"{self.device.name}: {said}. What was loaded is let go. End what else uses the memory, take a smaller "
            f"dtype or model, or allow offload (loading='device_map_auto', allow_offload=True)"
        )

    def _make(self, checkpoint: Checkpoint, scratch: Path) -> LoadedModel:
        from ladezeit.loading.registry import engine

        with self.clock.span("prepare"):
            request = self._prepare(checkpoint, scratch)
            chosen = engine(self.config.loading.engine)
            chosen.prepare(request)
            wanted = self._expected(checkpoint)
        with self.clock.span("turn"):
            _ONE_LOAD.acquire()
        try:
            loaded = load_steps.load(chosen, request, self.clock)
        finally:
            _ONE_LOAD.release()
        with self.clock.span("look"):
            self.effective.update(load_steps.effective_of(loaded))
        proof = self._prove(loaded, wanted)
        return LoadedModel(
            model=loaded.model,
            checkpoint=checkpoint,
            config=self.config,
            chosen_by=self.chosen_by,
            phases=self.clock.phases,
            proof=proof,
            effective=self.effective,
            device_map=loaded.device_map,
            total_s=self.clock.since_origin_s(),
        )

    def _prepare(self, checkpoint: Checkpoint, scratch: Path) -> "LoadRequest":
        """Check what can be checked before a weight is read, and make what the engine needs besides."""
        from ladezeit.loading import registry
        from ladezeit.placement_rules import check_on_machine
        from ladezeit.serving.fits import check_fits

        config = self.config
        registry.check(config.loading.engine, self.device.name, checkpoint.file_format)
        check_on_machine(config.loading, self.device)
        self._apply_runtime()
        check_fits(config, checkpoint, self.device.name)
        conversion = None
        engine = config.loading.engine
        if registry.converter(engine) is not None:
            from ladezeit.loading.conversion import conversion_for

            with self.clock.span("prepare/convert"):
                conversion = conversion_for(engine, checkpoint, config.model.name, cache_folder(), self.progress)
        return load_steps.make_request(
            config,
            checkpoint,
            self.device.name,
            scratch,
            conversion=conversion,
            progress=self._reading,
        )

    def _apply_runtime(self) -> None:
        """Apply the settings that a profile was measured with; what came too late for this process is an error."""
        if self.config.runtime != RuntimeConfig():
            from ladezeit.sample import runtime

            self.effective["runtime"] = runtime.apply(self.config.runtime, self.device.name)

    def _expected(self, checkpoint: Checkpoint) -> Any:
        from ladezeit.measure.environment import cpu_model
        from ladezeit.validation import NEED_MANIFEST, NEED_REFERENCE
        from ladezeit.validation.prepare import ProofFiles, subject_of
        from ladezeit.validation.prepare import prepare as make_proof_files

        proof_files = ProofFiles()
        if self.config.validation.level in (*NEED_MANIFEST, *NEED_REFERENCE):
            with self.clock.span("prepare/proof_files"):
                hardware = self.device.gpu.name if self.device.gpu is not None else str(cpu_model())
                subject = subject_of(
                    self.config, checkpoint, device=self.device.name, hardware=hardware, cache=cache_folder()
                )
                proof_files = make_proof_files(self.config, subject, self._making)
        return load_steps.expected(self.config, checkpoint, self.device.name, proof_files)

    def _making(self, what: str) -> None:
        """Make room for a reference load: another process cannot have what this one's allocators keep."""
        give_back()
        self.progress(what, 0, 0)

    def _prove(self, loaded: "EngineModel", wanted: Any) -> "Proof":
        from ladezeit.validation import prove, prove_spoken

        proof = prove(loaded, wanted, self.config.validation, self.clock)
        if proof.passed or not proof.ran:
            proof = prove_spoken(loaded, wanted, proof, self.clock)
        if proof.ran and not proof.passed:
            raise ValidationError(
                f"{self.config.model.name} by {self.config.loading.name} is not what was asked for "
                f"(validation={proof.level}): {proof.reason}",
                proof,
            )
        return proof

    def _keeps_files(self, made: LoadedModel) -> bool:
        """Return whether weights lie in the scratch folder, or in the folder that was given to be offloaded to."""
        return "disk" in (made.device_map or {}).values()

    def _remove(self, scratch: Path) -> None:
        from ladezeit.loading import placement

        if isinstance(self.config.loading, TransformersLoading):
            shutil.rmtree(placement.offload_folder(self.config.loading, scratch), ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)


def _clear(error: BaseException) -> None:
    """Empty the frames that an error, and those it came from, came through: they hold what was being loaded."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            waiting += [one.__cause__, one.__context__]
