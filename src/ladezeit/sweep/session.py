"""What one process keeps between samples: the supervisor's servers, the trackers, what was looked at once."""

import atexit
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import to_absolute_path
from rich.status import Status

from ladezeit.checkpoint.cache import Progress
from ladezeit.checkpoint.resolve import Checkpoint, prepare_checkpoint
from ladezeit.checkpoint.synthetic import synthetic_sizes
from ladezeit.config import CacheState, ModelConfig, RunConfig, SyntheticModel, TrackingConfig
from ladezeit.config.rules import check_combination
from ladezeit.config.serialize import point_id
from ladezeit.errors import REFUSALS, LadezeitError, NotRunnableError
from ladezeit.loading.base import Conversion
from ladezeit.loading.conversion import conversion_for
from ladezeit.loading.preflight import Sizes, check_runnable, devices_used
from ladezeit.loading.quantization import loading_scheme
from ladezeit.loading.registry import make_converter
from ladezeit.results.records import Result, SweepRecord
from ladezeit.runner.supervisor import Supervisor
from ladezeit.sweep.prepared import PreparedConfiguration
from ladezeit.sweep.progress import Display
from ladezeit.system.bandwidth import Ceilings, measure_apart
from ladezeit.system.device_lock import Against, Holder, lock_device
from ladezeit.system.environment import collect_environment
from ladezeit.system.files import cache_folder, write_atomically
from ladezeit.system.gpus import ResolvedDevice, gpu_memory_used_bytes, resolve_device
from ladezeit.system.nvml import Gpu
from ladezeit.system.page_cache import why_never_cold, why_untold
from ladezeit.system.torch_settings import import_environment
from ladezeit.tracking import Tracker, open_tracker
from ladezeit.validation.references import (
    NEED_MANIFEST,
    NEED_REFERENCE,
    ReferenceFiles,
    prepare_references,
    reference_key_of,
)

CEILINGS_FILE = "ceilings.json"


class Session:
    """Opened once a process; everything it holds is let go in `close_session`, in the reverse order."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.display = self._stack.enter_context(Display())
        self.supervisor = self._stack.enter_context(Supervisor())
        self.results: list[Result] = []
        self.planned = 1
        self.started = False  # whether any sample was: until then a refusal is the user's to cure
        self.sweep: SweepRecord | None = None  # the one that this process conducts
        self._checkpoints: dict[str, Checkpoint] = {}
        self._conversions: dict[tuple[str, str], Conversion | None] = {}
        self._devices: dict[str, ResolvedDevice] = {}
        self._prepared: dict[str, PreparedConfiguration | LadezeitError] = {}
        self._baselines: dict[str, int] = {}
        self._environments: dict[tuple[str, Path], dict[str, Any]] = {}
        self._ceilings: dict[tuple[str, Path], Ceilings | None] = {}
        self._never_cold: dict[int, str | None] = {}
        self._reference_files: dict[tuple[str, ...], ReferenceFiles | LadezeitError] = {}
        self._trackers: dict[tuple[str, str, str], Tracker] = {}

    def close(self) -> None:
        """End servers, let go of devices, take the live bar away."""
        self._stack.close()

    def enter_context(self, context: AbstractContextManager[None]) -> None:
        """Enter a context that is left when the session closes."""
        self._stack.enter_context(context)

    def get_checkpoint(self, model: ModelConfig) -> Checkpoint:
        """Return the model's checkpoint, made or fetched where it was not there; looked at once a process."""
        key = repr(model)
        if key not in self._checkpoints:
            with self.display.console.status(f"{model.name}: looking at the checkpoint") as status:
                self._checkpoints[key] = prepare_checkpoint(model, cache_folder(), _told(status, model.name))
        return self._checkpoints[key]

    def get_conversion(self, config: RunConfig) -> Conversion | None:
        """Return the model in its engine's own format, converted where it was not there; None where it needs none."""
        model, engine = config.model, config.loading.engine
        target = make_converter(engine)
        if target is None:
            return None
        key = (repr(model), target)
        if key not in self._conversions:
            checkpoint = self.get_checkpoint(model)
            with self.display.console.status(f"{model.name}: looking for its conversion") as status:
                told = _told(status, model.name)
                self._conversions[key] = conversion_for(engine, checkpoint, model.name, cache_folder(), told)
        return self._conversions[key]

    def check_cache_state(self, config: RunConfig) -> None:
        """Check that the state of the page cache that `config` asks for can be had; tried once for a file system.

        Raises:
            NotRunnableError: nothing is ever cold where the files lie, or nobody tells.
        """
        state = config.cache.state
        if state is CacheState.as_is:
            return
        conversion = self.get_conversion(config)
        files = self.get_checkpoint(config.model).shards if conversion is None else conversion.files
        reason = why_untold(files)
        if reason is None and state is not CacheState.warm:
            folders = sorted({file.resolve().parent for file in files})
            reason = next((why for folder in folders if (why := self._why_never_cold(folder))), None)
        if reason is not None:
            raise NotRunnableError(f"cache={state.value} cannot be had: {reason}")

    def _why_never_cold(self, folder: Path) -> str | None:
        number = folder.stat().st_dev
        if number not in self._never_cold:
            self._never_cold[number] = why_never_cold(folder)
        return self._never_cold[number]

    def prepare(self, config: RunConfig) -> PreparedConfiguration:
        """Check that `config` can be measured here, once for all its samples, and return what was found for it.

        Its checkpoint is made, fetched or converted where need be.

        Raises:
            CheckpointError, NotRunnableError, OutOfMemoryError: it cannot; the same at every call.
        """
        key = point_id(config)
        if key not in self._prepared:
            try:
                self._prepared[key] = self._prepare(config)
            except REFUSALS as refusal:
                self._prepared[key] = refusal
        found = self._prepared[key]
        if isinstance(found, LadezeitError):
            raise found
        return replace(found, config=config)

    def _prepare(self, config: RunConfig) -> PreparedConfiguration:
        check_combination(config)
        import_environment(config.runtime)  # what torch's allocator would not understand is refused before any process
        device = self.get_device(config.device)
        check_runnable(
            config, device, self.get_sizes(config.model)
        )  # before a checkpoint of gigabytes is made for nothing
        checkpoint = self.get_checkpoint(config.model)
        config.loading.check_model(checkpoint.config)
        conversion = self.get_conversion(config)
        self.check_cache_state(config)
        devices = tuple(devices_used(config.loading, device))
        return PreparedConfiguration(config, device, devices, checkpoint, conversion)

    def get_sizes(self, model: ModelConfig) -> Sizes:
        """Return how large the model's checkpoint is, or will be; nothing is written to find out."""
        if isinstance(model, SyntheticModel):
            return synthetic_sizes(model)
        return self.get_checkpoint(model)

    def get_device(self, requested: str) -> ResolvedDevice:
        """Return the device that is there, having said so where it is not what one hopes for."""
        if requested not in self._devices:
            self._devices[requested] = resolve_device(requested)
            note = self._devices[requested].note
            if note:
                self.display.print_note(note, "bold yellow")
        return self._devices[requested]

    def gpu_baseline_bytes(self, gpu: Gpu) -> int:
        """Return what was in use on the GPU when this session first looked: others' memory, which never drains."""
        if gpu.uuid not in self._baselines:
            self._baselines[gpu.uuid] = gpu_memory_used_bytes(gpu)
        return self._baselines[gpu.uuid]

    @contextmanager
    def hold_all(self, devices: Iterable[ResolvedDevice], against: Against) -> Iterator[None]:
        """Hold several devices at once, always in the same order, so that two processes never wait for each other."""
        with ExitStack() as taken:
            for device in sorted(set(devices), key=lambda device: device.gpu.uuid if device.gpu else ""):
                taken.enter_context(self.hold_device(device, against))
            yield

    def hold_device(self, device: ResolvedDevice, against: Against) -> AbstractContextManager[None]:
        """Hold the device for the block, against other samples or other sweeps, saying who has it while waiting."""

        def waiting(holder: Holder | None) -> None:
            who = f"process {holder.pid} ({holder.command})" if holder else "another process"
            self.display.print_note(f"waiting for {device.name}: {who} is measuring on it", "yellow")

        return lock_device(device, waiting, against=against)

    def get_environment(self, device: ResolvedDevice, folder: Path) -> dict[str, Any]:
        """Return the facts about machine and libraries; collected once a process."""
        key = (device.name, folder)
        if key not in self._environments:
            self._environments[key] = collect_environment(device, folder)
        return dict(self._environments[key])

    def get_ceilings(self, device: ResolvedDevice, checkpoint: Checkpoint) -> Ceilings | None:
        """Return the rates that the machine allows, measured at the first call; None, and why, where that failed."""
        key = (device.name, checkpoint.folder)
        if key not in self._ceilings:
            self._ceilings[key] = None
            if device.gpu is not None:
                self.gpu_baseline_bytes(device.gpu)  # before a process of ours is on it
            try:
                with (
                    self.hold_device(device, "samples"),
                    self.display.console.status("measuring what the machine allows"),
                ):
                    self._ceilings[key] = measure_apart(device.name, checkpoint.shards)
            except (LadezeitError, OSError, ValueError, TypeError) as error:
                self.display.print_note(f"without ceilings: {error}", "yellow")
        return self._ceilings[key]

    def known_ceilings(self, device: ResolvedDevice, checkpoint: Checkpoint) -> Ceilings | None:
        """Return what `ceilings` found or `recall_ceilings` read; None where neither did."""
        return self._ceilings.get((device.name, checkpoint.folder))

    def save_ceilings(self, folder: Path) -> None:
        """Write what is known to ``folder/ceilings.json``, for jobs that a launcher runs in other processes."""
        known = [
            {"device": device, "checkpoint": str(checkpoint), "ceilings": found.to_plain()}
            for (device, checkpoint), found in self._ceilings.items()
            if found is not None
        ]
        if known:
            write_atomically(folder / CEILINGS_FILE, json.dumps(known, indent=2, allow_nan=False) + "\n")

    def recall_ceilings(self, folder: Path) -> None:
        """Read what `save_ceilings` wrote; a sweep without that file has no ceilings."""
        if (folder / CEILINGS_FILE).exists():
            for entry in json.loads((folder / CEILINGS_FILE).read_text(encoding="utf-8")):
                key = (entry["device"], Path(entry["checkpoint"]))
                self._ceilings.setdefault(key, Ceilings.from_plain(entry["ceilings"]))

    def reference_files(self, prepared: PreparedConfiguration) -> ReferenceFiles:
        """Return what the config's validation level verifies a sample by, made at the first call where it is not there.

        Raises:
            CheckpointError, NotRunnableError, OutOfMemoryError: it cannot be made; the same at every call.
        """
        config, loading, device = prepared.config, prepared.config.loading, prepared.device
        made = (loading.dtype, loading_scheme(loading), loading.process_count)
        key = tuple(map(repr, (config.validation.level, config.model, made, config.runtime, device.name)))
        if key not in self._reference_files:
            try:
                self._reference_files[key] = self._make_references(config, device, prepared.checkpoint)
            except REFUSALS as refusal:
                self._reference_files[key] = refusal
        found = self._reference_files[key]
        if isinstance(found, LadezeitError):
            raise found
        return found

    def _make_references(self, config: RunConfig, device: ResolvedDevice, checkpoint: Checkpoint) -> ReferenceFiles:
        if config.validation.level not in (*NEED_MANIFEST, *NEED_REFERENCE):
            return ReferenceFiles()
        cpu = self.get_environment(device, checkpoint.folder)["cpu"]["model"]
        if device.gpu is not None:
            self.gpu_baseline_bytes(device.gpu)  # before a process of ours is on it
        with (
            self.hold_device(device, "samples"),
            self.display.console.status(f"{config.model.name}: reference") as status,
        ):
            hardware = device.gpu.name if device.gpu is not None else str(cpu)
            subject = reference_key_of(config, checkpoint, device=device.name, hardware=hardware, cache=cache_folder())
            return prepare_references(config, subject, lambda what: status.update(f"{config.model.name}: {what}"))

    def get_tracker(self, config: RunConfig) -> Tracker:
        """Return the tracker of the config; opened once a process."""
        tracking: TrackingConfig = config.tracking
        outputs = to_absolute_path(config.outputs)  # jobs may have working directories of their own
        key = (tracking.kind.value, str(tracking.uri), outputs)
        if key not in self._trackers:
            with self.display.console.status("opening the tracking store"):
                self._trackers[key] = open_tracker(tracking, Path(outputs))
        return self._trackers[key]


def _told(status: Status, name: str) -> Progress:
    """Return a callback that shows what is being done with the model `name`, and how far it is."""

    def told(what: str, done: int, total: int) -> None:
        share = f" {done / total:.0%} of {total / 1e9:.1f} GB" if total else ""
        status.update(f"{name}: {what}{share}")

    return told


_current: Session | None = None


def current_session() -> Session:
    """Return this process's session, opened at the first call (launchers may run jobs in processes of their own)."""
    global _current
    if _current is None:
        _current = Session()
        atexit.register(close_session)
    return _current


def close_session() -> None:
    """Close this process's session, if there is one."""
    global _current
    if _current is not None:
        _current.close()
        _current = None
