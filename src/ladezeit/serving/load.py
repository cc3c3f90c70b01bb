"""`load`: a Hugging Face language model in this process, by the measured best method, verified before it returns."""

import contextlib
import gc
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladezeit.checkpoint.cache import Progress
from ladezeit.checkpoint.resolve import Checkpoint, prepare_checkpoint
from ladezeit.config import LoadConfig, LoadingConfig, ModelConfig, RuntimeConfig, TransformersLoading
from ladezeit.config.device_map import offload_folder
from ladezeit.errors import OutOfMemoryError, ran_out_of_memory
from ladezeit.results.records import Phase
from ladezeit.runner import pipeline
from ladezeit.serving.protocols import Bytes
from ladezeit.serving.request import ChosenLoad, LoadArguments, config_of
from ladezeit.system.files import cache_folder
from ladezeit.system.fork import renew_after_fork
from ladezeit.system.gpus import ResolvedDevice, resolve_device
from ladezeit.system.processes import trim_allocators
from ladezeit.timing.clock import LOAD, Clock
from ladezeit.validation.verification import ValidationError

if TYPE_CHECKING:
    from ladezeit.loading.base import EngineModel, LoadRequest
    from ladezeit.validation.expected import Expected
    from ladezeit.validation.verification import Verification


#: Engines set variables of the process and wrap functions of the library while they load, and two loads at once would
#: only share the disk.
_ONE_LOAD = threading.RLock()
renew_after_fork(_ONE_LOAD)


# What `ladezeit.load` returns: a verified model, and the record of how it came to be.


@dataclass(eq=False)
class LoadedModel:
    """A model in this process, as it was asked for.

    `model` is the `transformers` model, in eval mode. `phases` are seconds since the call of `load`; what none of them
    explains is `total_s` less the sum of the outermost. `verification` says what was checked and what that guarantees.
    `effective` says what really happened (engine, threads, bytes read, attention, dtype, device), as a result file has
    it; `device_map` is module to device where the placement was over several. `config` holds the method, and
    `chosen_by` who chose it: ``loading``, ``profile`` or ``auto``.
    """

    model: Any
    checkpoint: "Checkpoint"
    config: LoadConfig
    chosen_by: str
    phases: list[Phase]
    verification: "Verification"
    effective: dict[str, Any]
    device_map: dict[str, str] | None
    total_s: float

    @property
    def load_s(self) -> float:
        """Seconds of the load alone, without imports, preparation, verification: ``load/total_s`` of a result file."""
        return sum(phase.duration_s for phase in self.phases if phase.path == LOAD)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, read at the first use; None where it has none.

        Raises:
            CheckpointError: it cannot be read.
        """
        from ladezeit.checkpoint.tokenizer import read_tokenizer

        return read_tokenizer(self.checkpoint.folder)

    def __repr__(self) -> str:
        return (
            f"<LoadedModel {self.config.model.name} by {self.config.loading.name} on {self.effective['device']} in "
            f"{self.load_s:.3f} s ({self.total_s:.3f} s in all); validation={self.verification.level}>"
        )


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
    """Load a model, verify it, and return it; may be called from any thread; loads run one after another.

    Args:
        model: a configured name, a folder, or a hub id: ``org/name``, better ``org/name@revision``. Code of a
            checkpoint is not run, unless a configured model says ``trust_remote_code``.
        device: ``auto`` (the first GPU, the CPU where there is none), ``cpu``, ``cuda`` or ``cuda:N``.
        profile: a loading profile, as `ladezeit-results verdict` writes it, or its content: the method for this model.
        loading: the name of an option in ``conf/loading`` or its arguments; goes before the profile. Without either
            `auto` chooses.
        validation: what is verified before the model is returned: ``placement`` (milliseconds), ``content`` (every bit,
            against a manifest that is made at the first load and kept), ``logits``, ``full``, or ``none``.
        max_memory: what a strategy (``loading="device_map_auto"``) may fill: place to size (``20GiB``) or share.
        allow_offload: whether weights may stay off the device; without, that is an error.
        progress: told what is being done, bytes done and bytes in all (0 where that is not known), from any thread.
        config_dir: a folder of your own options, as Hydra's ``--config-dir`` takes it.

    Raises:
        ConfigError: a name or value is unknown, or values do not go together.
        CheckpointError: the checkpoint is unavailable, damaged, or not safe to read.
        NotRunnableError: no such device, a package is missing, or the model does not fit; nothing was read.
        OutOfMemoryError: device or host memory ran out; what was loaded is freed.
        LoadError: the load did not produce the requested model.
        ValidationError: it failed verification; its memory is freed.
    """
    clock = Clock(time.monotonic_ns(), notify=lambda path: progress(path, 0, 0) if progress else None)
    with clock.span("config"):
        found = resolve_device(device)
        own = Path(config_dir).expanduser() if config_dir is not None else None
        asked = LoadArguments(model, loading, profile, validation, max_memory, allow_offload, own)
        chosen = config_of(asked, found)
    return _Load(chosen, found, clock, progress).run_load()


def load_as_chosen(chosen: ChosenLoad, device: ResolvedDevice) -> LoadedModel:
    """Load what was chosen and checked already (see `config_of`); raises as `load` does."""
    return _Load(chosen, device, Clock(time.monotonic_ns()), lambda what, done, total: None).run_load()


class _Load:
    """One load under way."""

    def __init__(self, chosen: ChosenLoad, device: ResolvedDevice, clock: Clock, progress: Progress | None) -> None:
        self.chosen = chosen
        self.config = chosen.config
        self.device = device
        self.clock = clock
        self.progress: Progress = progress or (lambda what, done, total: None)
        self._reading = None if progress is None else lambda done, total, seconds: progress("load/read", done, total)
        self.effective: dict[str, Any] = {}

    def run_load(self) -> LoadedModel:
        with self.clock.span("checkpoint"):
            checkpoint = prepare_checkpoint(self.config.model, cache_folder(), self.progress)
        self.chosen.check_checkpoint(checkpoint)
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
            from ladezeit.loading import registry  # noqa: F401
            from ladezeit.model.classes import model_class
            from ladezeit.validation import levels  # noqa: F401  # needed later, and counted here

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
            self.clock.synchronize = pipeline.completion_waiter(self.config.loading)
            yield

    @contextlib.contextmanager
    def _freed_on_error(self) -> Iterator[None]:
        """Let go of what a failed load brought into memory: an error that somebody keeps would keep it too."""
        try:
            yield
        except BaseException as error:
            _clear(error)
            gc.collect()
            trim_allocators()
            if isinstance(error, Exception) and ran_out_of_memory(error) and not isinstance(error, OutOfMemoryError):
                raise self._too_large(error) from error
            raise

    def _too_large(self, error: Exception) -> OutOfMemoryError:
        said = str(error).strip().split("\n")[0] or type(error).__name__
        return OutOfMemoryError(
            f"memory ran out while {self.config.model.name} was loaded by {self.config.loading.name} to "
            f"{self.device.name}: {said}. What was loaded is freed. Stop what else uses the memory, use a smaller "
            f"dtype or model, or allow offload (loading='device_map_auto', allow_offload=True)"
        )

    def _make(self, checkpoint: Checkpoint, scratch: Path) -> LoadedModel:
        from ladezeit.loading.registry import make_engine

        with self.clock.span("prepare"):
            request = self._prepare(checkpoint, scratch)
            chosen = make_engine(self.config.loading.engine)
            chosen.prepare(request)
            wanted = expected_of(self.config, checkpoint, self.device, self.clock, self.progress)
        with self.clock.span("turn"):
            _ONE_LOAD.acquire()
        try:
            loaded = pipeline.load_model(chosen, request, self.clock)
        finally:
            _ONE_LOAD.release()
        with self.clock.span("look"):
            self.effective.update(pipeline.effective_of(loaded))
        verification = self._verify(loaded, wanted)
        return LoadedModel(
            model=loaded.model,
            checkpoint=checkpoint,
            config=self.config,
            chosen_by=self.chosen.chosen_by,
            phases=self.clock.phases,
            verification=verification,
            effective=self.effective,
            device_map=loaded.device_map,
            total_s=self.clock.since_origin_s(),
        )

    def _prepare(self, checkpoint: Checkpoint, scratch: Path) -> "LoadRequest":
        """Check what can be checked before a weight is read, and make what the engine needs besides."""
        from ladezeit.loading import registry
        from ladezeit.loading.preflight import check_memory, check_on_machine

        config = self.config
        registry.check_engine(config.loading.engine, self.device.name, checkpoint.file_format)
        check_on_machine(config.loading, self.device)
        self._apply_runtime()
        check_memory(config, checkpoint, self.device.name)
        conversion = None
        engine = config.loading.engine
        if registry.make_converter(engine) is not None:
            from ladezeit.loading.conversion import conversion_for

            with self.clock.span("prepare/convert"):
                conversion = conversion_for(engine, checkpoint, config.model.name, cache_folder(), self.progress)
        return pipeline.make_request(
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
            from ladezeit.system import torch_settings

            self.effective["runtime"] = torch_settings.apply_settings(self.config.runtime, self.device.name)

    def _verify(self, loaded: "EngineModel", wanted: Any) -> "Verification":
        from ladezeit.validation.levels import verify_loaded

        verification = verify_loaded(loaded, wanted, self.config.validation, self.clock)
        if verification.ran and not verification.passed:
            raise ValidationError(
                f"{self.config.model.name} by {self.config.loading.name} is not what was asked for "
                f"(validation={verification.level}): {verification.reason}",
                verification,
            )
        return verification

    def _keeps_files(self, made: LoadedModel) -> bool:
        """Return whether weights lie in the scratch folder, or in the folder that was given to be offloaded to."""
        return "disk" in (made.device_map or {}).values()

    def _remove(self, scratch: Path) -> None:

        if isinstance(self.config.loading, TransformersLoading):
            shutil.rmtree(offload_folder(self.config.loading, scratch), ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)


def expected_of(
    config: LoadConfig, checkpoint: Checkpoint, device: ResolvedDevice, clock: Clock, progress: Progress
) -> "Expected":
    """Return what `config` asks a model to be, with the references that its level needs, made where there are none.

    Raises:
        CheckpointError: the checkpoint's files are damaged, or its reference load failed.
        NotRunnableError: the reference load does not fit this machine.
    """
    from ladezeit.system.environment import cpu_model
    from ladezeit.validation.references import (
        NEED_MANIFEST,
        NEED_REFERENCE,
        ReferenceFiles,
        prepare_references,
        reference_key_of,
    )

    def building(what: str) -> None:
        trim_allocators()  # another process cannot have what this one's allocators keep
        progress(what, 0, 0)

    reference_files = ReferenceFiles()
    if config.validation.level in (*NEED_MANIFEST, *NEED_REFERENCE):
        with clock.span("prepare/references"):
            hardware = device.gpu.name if device.gpu is not None else str(cpu_model())
            subject = reference_key_of(config, checkpoint, device=device.name, hardware=hardware, cache=cache_folder())
            reference_files = prepare_references(config, subject, building)
    return pipeline.make_expected(config, checkpoint, device.name, reference_files)


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


# Whether a model's memory is really given back: watched at the storages themselves, whoever holds them.


class StorageWatch:
    """The storages behind a model's tensors, watched without being held."""

    def __init__(self, model: Any) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        from ladezeit.model.tensors import iter_storage_tensors

        storages = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage()
            for tensor in iter_storage_tensors(model)
            if not tensor.is_meta and tensor.numel() > 0
        }
        self._storages: list[Any] = [StorageWeakRef(storage) for storage in storages.values()]  # type: ignore[no-untyped-call]

    def is_gone(self) -> bool:
        """Say whether the last tensor that shares memory with the model is gone."""
        self._storages = [storage for storage in self._storages if not storage.expired()]
        return not self._storages

    def is_gone_after_collection(self) -> bool:
        """As `is_gone`, after the garbage collector took what only cycles hold; it runs only where it is needed."""
        if self.is_gone():
            return True
        gc.collect()
        return self.is_gone()


def taken_bytes() -> Bytes:
    """Return the memory that this process has from the machine: resident pages, and what torch reserved on GPUs."""
    import psutil

    torch = sys.modules.get("torch")
    gpu = 0
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        gpu = sum(torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count()))
    return Bytes(gpu=gpu, host=psutil.Process().memory_info().rss)
