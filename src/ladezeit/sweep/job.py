"""One Hydra job is one sample: from a composed config to ``result.json`` and to MLflow."""

import os
import shlex
import shutil
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from ladezeit.config import RunConfig, TransformersLoading, build_config, to_plain
from ladezeit.config.device_map import offload_folder
from ladezeit.config.serialize import point_id
from ladezeit.errors import REFUSALS, LadezeitError, TrackingError, ran_out_of_memory
from ladezeit.loading.preflight import converts_dtype, weights_bytes
from ladezeit.report.timeline import draw_timeline
from ladezeit.results.labels import make_label
from ladezeit.results.records import (
    FILE_NAME,
    SWEEP_FILE_NAME,
    TIMELINE_FILE,
    ErrorReport,
    Identity,
    Result,
    Status,
    SweepRecord,
    save_result,
)
from ladezeit.runner.spec import FILE_NAME as SPEC_FILE_NAME
from ladezeit.runner.spec import SCRATCH, WorkerSpec
from ladezeit.sweep.prepared import PreparedConfiguration
from ladezeit.sweep.session import Session, current_session
from ladezeit.system.bandwidth import Ceilings, binding_ceiling
from ladezeit.system.gpus import ResolvedDevice, wait_until_drained
from ladezeit.system.page_cache import set_state

FIRST_ATTEMPT_FILE = "result.invalid.json"
_DRAIN_LIMIT_S = 20.0


def run_job(composed: DictConfig) -> float:
    """Measure one composed point; return ``load/total_s``, infinite where there is none (sweepers may minimize it).

    In a sweep every sample has a result: what cannot be measured is `skipped` (`oom` where memory ran out) with that
    reason, and a sample that breaks in ladezeit itself is `failed` with the trace.

    Raises:
        ConfigError, CheckpointError, NotRunnableError, OutOfMemoryError: outside of a sweep, where nothing can be
            measured.
        LadezeitError: the sample's folder holds a result already.
    """
    config = build_config(composed)
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    session = current_session()
    one_of_many = hydra.mode is RunMode.MULTIRUN
    sweep_folder = Path(to_absolute_path(hydra.sweep.dir))
    sweep = _sweep_of(session, sweep_folder) if one_of_many else None
    identity = _identity(config, list(hydra.overrides.task), hydra.job.num if one_of_many else 0, sweep)
    if (folder / FILE_NAME).exists():
        raise LadezeitError(f"{folder} holds a result already: choose another folder, nothing measured is overwritten")
    try:
        if sweep is None:
            result = _measure_alone(session, config, identity, folder)
        else:
            session.recall_ceilings(sweep_folder)
            result = measure_sample(session, session.prepare(config), identity, folder)
    except Exception as error:
        if not one_of_many:
            raise
        result = not_started(config, identity, error)
        _save(session, result, folder)
    session.results.append(result)
    session.display.show_result(result)
    track_sample(session, config, result, folder, sweep)
    return result.metrics.get("load/total_s", float("inf")) if result.status is Status.ok else float("inf")


def _sweep_of(session: Session, folder: Path) -> SweepRecord | None:
    """Return the record of the sweep in `folder`, None where another sweeper than ladezeit's runs the jobs.

    The process that conducts the sweep knows it without the file too.
    """
    if session.sweep is None and not (folder / SWEEP_FILE_NAME).exists():
        return None
    return session.sweep or SweepRecord.read_record(folder)


def _measure_alone(session: Session, config: RunConfig, identity: Identity, folder: Path) -> Result:
    session.get_tracker(config)  # what cannot be logged is said before it is measured
    prepared = session.prepare(config)
    session.enter_context(session.hold_all(prepared.devices, "sweeps"))  # a sweep holds its devices itself
    if config.ceilings:
        session.get_ceilings(prepared.device, prepared.checkpoint)
    return measure_sample(session, prepared, identity, folder)


def _save(session: Session, result: Result, folder: Path) -> None:
    """Write a result; where that is not possible it is said, and the sweep's end counts it as missing."""
    try:
        save_result(result, folder)
    except OSError as error:
        session.display.print_note(f"{result.identity.label} has no result file: {error}", "yellow")


def measure_sample(session: Session, prepared: PreparedConfiguration, identity: Identity, folder: Path) -> Result:
    """Measure one sample into `folder`; where it cannot be verified, that is said before anything is written."""
    config, device, checkpoint, conversion = prepared.config, prepared.device, prepared.checkpoint, prepared.conversion
    reference_files = session.reference_files(prepared)
    spec = WorkerSpec(
        config=config,
        checkpoint=checkpoint,
        identity=identity,
        device=device.name,
        folder=folder,
        environment=session.get_environment(device, conversion.folder if conversion else checkpoint.folder),
        conversion=conversion,
        manifest=reference_files.manifest,
        reference=reference_files.reference,
    )
    spec.environment["checkpoint"] = {
        "fingerprint": checkpoint.fingerprint,
        "weight_bytes": checkpoint.weight_bytes,
        "dtype": checkpoint.dtype,
    }
    ceilings = session.known_ceilings(device, checkpoint) if _ceilings_apply(spec) else None
    if ceilings is not None:
        spec.environment["ceilings"] = ceilings.to_plain()
    try:
        with session.hold_all(prepared.devices, "samples"):
            session.started = True
            session.display.show_sample(identity.label)
            result = _attempt(session, spec, prepared.devices)
            if result.status is Status.invalid:
                # The kernel sometimes takes pages back between setting the cache's state and the load: once more.
                (folder / FILE_NAME).rename(folder / FIRST_ATTEMPT_FILE)
                result = _attempt(session, spec, prepared.devices)
    finally:
        _remove_scratch(config, folder)
        (folder / SPEC_FILE_NAME).unlink(missing_ok=True)
    if ceilings is not None and _add_ceiling(result, spec, ceilings):
        _save(session, result, folder)
    with suppress(OSError):  # a full disk costs the picture, not the sample
        draw_timeline(result, folder / TIMELINE_FILE)
    return result


def _ceilings_apply(spec: WorkerSpec) -> bool:
    """Return whether ceilings are wanted, and were measured on the disk that the files to read lie on."""
    if spec.config.ceilings is False or spec.conversion is None:
        return spec.config.ceilings is not False
    return spec.conversion.folder.stat().st_dev == spec.checkpoint.shards[0].stat().st_dev


def _remove_scratch(config: RunConfig, folder: Path) -> None:
    """Remove what the sample wrote for itself, offloaded weights included, wherever they were to go."""
    scratch = folder / SCRATCH
    if isinstance(config.loading, TransformersLoading):
        shutil.rmtree(offload_folder(config.loading, scratch), ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)


def _add_ceiling(result: Result, spec: WorkerSpec, ceilings: Ceilings) -> bool:
    """Add the ceiling that limited this load, and the share of it that was reached; False where one is not known."""
    loading, checkpoint = spec.config.loading, spec.checkpoint
    found = binding_ceiling(
        ceilings,
        spec.config.cache.state,
        spec.device,
        not converts_dtype(loading, checkpoint.dtype),
        resident_share=result.metrics.get("cache/resident_before_share"),
        written_per_read=weights_bytes(loading, 1000, checkpoint.dtype) / 1000,
    )
    if found is None or "load/gb_per_s" not in result.metrics:
        return False
    result.effective["ceiling"], gb_per_s = found
    result.metrics["load/ceiling_gb_per_s"] = gb_per_s
    result.metrics["load/ceiling_share"] = result.metrics["load/gb_per_s"] / gb_per_s
    return True


def _attempt(session: Session, spec: WorkerSpec, devices: Sequence[ResolvedDevice]) -> Result:
    _set_the_stage(session, spec, devices)
    return session.supervisor.run_sample(spec, session.display.show_phase)


def _set_the_stage(session: Session, spec: WorkerSpec, devices: Sequence[ResolvedDevice]) -> None:
    """Wait until the GPUs are free of the last sample, set the page cache's state, and note both for the record."""
    gpus = [device.gpu for device in devices if device.gpu is not None]
    drains = [wait_until_drained(gpu, session.gpu_baseline_bytes(gpu), _DRAIN_LIMIT_S) for gpu in gpus]
    if drains:
        spec.environment["gpu_memory_used_before_bytes"] = drains[0].used_bytes
        spec.environment["gpu_drained"] = all(drain.drained for drain in drains)
    session.display.show_phase("cache")
    prepared = set_state(spec.files, spec.config.cache.state)
    spec.environment["cache_preparation"] = {
        "resident_before_share": prepared.resident_before_share,
        "seconds": prepared.seconds,
    }


def track_sample(session: Session, config: RunConfig, result: Result, folder: Path, sweep: SweepRecord | None) -> None:
    """Log the sample; a store that fails costs the sample nothing: its files are the truth and can be imported."""
    varying = sweep.varying if sweep else [override.partition("=")[0] for override in result.identity.overrides]
    try:
        session.get_tracker(config).log_sample(result, folder, sweep, varying)
    except (TrackingError, OSError) as error:
        session.display.print_note(f"not in MLflow: {error}", "yellow")


def not_started(config: RunConfig, identity: Identity, error: Exception) -> Result:
    """Return the result of a sample that was never started: `oom` where memory ran out before it, `skipped` where it
    was refused, and `failed` for an error that is none of those: a defect, whose trace is kept.
    """
    refused = isinstance(error, REFUSALS)
    report = ErrorReport(type(error).__name__, str(error), "".join(traceback.format_exception(error)))
    return Result(
        status=Status.oom if ran_out_of_memory(error) else Status.skipped if refused else Status.failed,
        identity=identity,
        config=to_plain(config),
        started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        reason=str(error) if refused else f"{type(error).__name__}: {error}",
        metrics={"sample/wall_s": 0.0},
        error=None if refused else report,
    )


def _identity(config: RunConfig, overrides: list[str], number: int, sweep: SweepRecord | None) -> Identity:
    named = (
        sweep.labels[number]
        if sweep
        else make_label({"cache": config.cache.state.value, "loading": config.loading.name}, 0)
    )
    return Identity(
        point=point_id(config),
        sample=config.sample,
        job=number,
        label=named,
        overrides=overrides,
        command=rerun_command(overrides, in_sweep=HydraConfig.get().mode is RunMode.MULTIRUN, config=config),
        sweep=sweep.id if sweep else None,
    )


def rerun_command(overrides: list[str], in_sweep: bool, config: RunConfig | None = None) -> str:
    """Return the command that measures the sample again, alone, whatever mode its experiment asks for.

    Where its options and its code come from is part of it: the folder of ``--config-dir``, another ``--config-name``,
    Hydra's search path, and PYTHONPATH for a user's own engine or loader in `config`.
    """
    python_path = os.environ.get("PYTHONPATH") if config is not None and _runs_own_code(config) else None
    program = ["env", f"PYTHONPATH={_absolute(python_path)}", "ladezeit"] if python_path else ["ladezeit"]
    return shlex.join([*program, *_config_flags(), *overrides, *(["hydra.mode=RUN"] if in_sweep else [])])


def _runs_own_code(config: RunConfig) -> bool:
    return ":" in config.loading.engine or ":" in str(getattr(config.loading, "function", ""))


def _absolute(python_path: str) -> str:
    return os.pathsep.join(to_absolute_path(folder) for folder in python_path.split(os.pathsep) if folder)


def _config_flags() -> list[str]:
    """Return the flags and overrides by which this process found its option files; none outside of the command line."""
    if not HydraConfig.initialized():
        return []
    found = HydraConfig.get()
    folders = [source.path for source in found.runtime.config_sources if source.provider == "command-line"]
    name = str(found.job.config_name)
    return [
        *(word for folder in folders for word in ("--config-dir", to_absolute_path(folder.removeprefix("file://")))),
        *(["--config-name", name] if name != "config" else []),
        *(word for word in found.overrides.hydra if word.lstrip("+").startswith("hydra.searchpath=")),
    ]
