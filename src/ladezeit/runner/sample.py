"""One measurement, from imports to the last token, and what becomes of an error in its middle."""

import contextlib
import json
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from ladezeit.config import CacheState, ProcessKind, to_plain
from ladezeit.errors import CombinationError, LadezeitError, LoadError, NotRunnableError, ran_out_of_memory
from ladezeit.results.records import ErrorReport, Result, Status
from ladezeit.runner import pipeline
from ladezeit.runner.spec import SCRATCH, WorkerSpec
from ladezeit.system.files import write_atomically
from ladezeit.timing.clock import FIRST_TOKEN, LOAD, Clock

if TYPE_CHECKING:
    from ladezeit.loading.base import Engine, EngineModel, LoadRequest
    from ladezeit.timing.profiler import Profiler
    from ladezeit.timing.resources import ResourceMeter
    from ladezeit.validation.expected import Expected
    from ladezeit.validation.verification import Verification


CACHE_CHECK = "cache_check"
FIRST_TOUCH = "first_touch"
#: Buffers on the way, and whatever else a load allocates.
_BESIDES_WEIGHTS_BYTES = 256 * 2**20
TEXT_FILE = "generated.txt"

FINDINGS_FILE = "findings.json"


class Sample:
    """One measurement from imports to the last token; everything found so far survives an error in the middle."""

    def __init__(self, spec: WorkerSpec, origin_ns: int, notify: Callable[[str], None]) -> None:
        self.spec = spec
        self._notify = notify
        self.clock = Clock(origin_ns, notify=notify, detail=spec.config.phases)
        self.result = Result(
            status=Status.failed,
            identity=spec.identity,
            config=to_plain(spec.config),
            started_at=spec.started_at,
            environment=spec.environment,
        )
        self.result.phases = self.clock.phases
        self._profiler = _profiler() if spec.config.profile else None
        if spec.conversion is not None:
            self.result.effective["conversion"] = spec.conversion.to_json()

    def run_sample(self) -> Result:
        """Measure, and turn whatever happens into a result."""
        try:
            self._measure()
        except Exception as error:
            self._report(error)
        if self._profiler is not None:
            self.result.effective["profile"] = self._profiler.save_profile(self.spec.folder)
        self.result.metrics.update(load_metrics(self.clock, self.spec.checkpoint.weight_bytes, self.spec.file_bytes))
        self.result.metrics["sample/wall_s"] = self.clock.since_origin_s()
        return self.result

    def _measure(self) -> None:
        from ladezeit.loading.registry import make_engine

        self._import()
        device = self._open_device()
        from ladezeit.system import torch_settings
        from ladezeit.timing.resources import ResourceMeter

        with self.clock.span("runtime"):
            self.result.effective["runtime"] = torch_settings.apply_settings(self.spec.config.runtime, device)
        request = self._request()
        chosen = make_engine(self.spec.config.loading.engine)
        chosen.prepare(request)
        meter = ResourceMeter(device)
        if not self._cache_is_as_asked():
            return
        self._touch_memory()
        loaded = self._load(chosen, request, meter)
        self._look_at(loaded, meter)
        wanted = self._expected()
        verification = self._verify(loaded, wanted)
        if verification is not None:
            self._infer(loaded)
            if self._verify_generation(loaded, wanted, verification):
                self.result.status = Status.ok
        self.result.metrics.update(meter.read_metrics())

    def _import(self) -> None:
        with self.clock.span("import"):
            from ladezeit.model.classes import model_class

            model_class(self.spec.checkpoint.config)

    def _open_device(self) -> str:
        device = self.spec.device
        if device.startswith("cuda"):
            import torch

            with self.clock.span("cuda_context"):
                torch.cuda.set_device(device)
                torch.zeros(1, device=device)
                torch.cuda.synchronize()
            self._check_gpu()
            self.clock.synchronize = pipeline.completion_waiter(self.spec.config.loading)
        return device

    def _check_gpu(self) -> None:
        from ladezeit.system.gpus import check_opened
        from ladezeit.system.nvml import Gpu

        found = self.spec.environment.get("device", {})
        if found.get("gpu") and found["name"] == self.spec.device:  # a rank's is its own
            check_opened(self.spec.device, Gpu(**found["gpu"]))

    def _request(self) -> "LoadRequest":
        from ladezeit.loading.progress import throttle_progress

        scratch = self.spec.folder / SCRATCH
        scratch.mkdir(exist_ok=True)
        progress = throttle_progress(lambda text: self._notify(f"load/read: {text}")) if self.clock.detail else None
        spec = self.spec
        return pipeline.make_request(
            spec.config, spec.checkpoint, spec.device, scratch, conversion=spec.conversion, progress=progress
        )

    def _expected(self) -> "Expected":
        from ladezeit.validation.references import ReferenceFiles

        reference_files = ReferenceFiles(self.spec.manifest, self.spec.reference)
        return pipeline.make_expected(self.spec.config, self.spec.checkpoint, self.spec.device, reference_files)

    def _cache_is_as_asked(self) -> bool:
        """Read the page cache's state back: what was set before this process started may have been undone since.

        What a system takes back of a warm file while a process starts is read in again: that takes no longer than to
        start another one.
        """
        from ladezeit.system.page_cache import verify_state, warm_pages

        files, state = self.spec.files, self.spec.config.cache.state
        with self.clock.span(CACHE_CHECK):
            share, as_asked, reason = verify_state(files, state)
            if not as_asked and state is CacheState.warm:
                self.result.effective["warmed_again_from_share"] = share
                warm_pages(files)
                share, as_asked, reason = verify_state(files, state)
        self.result.metrics["cache/resident_before_share"] = share
        if not as_asked:
            self.result.status = Status.invalid
            self.result.reason = reason
        return as_asked

    def _touch_memory(self) -> None:
        """Have the machine fetch the memory that the load will take, right here, for it is taken back in seconds.

        What this process has already comes after it: gigabytes touched make the machine lose sight of that.
        """
        from ladezeit.loading.preflight import weights_bytes
        from ladezeit.system.memory_warmup import TOUCHED_TIMES, touch_free_memory, touch_own_memory

        checkpoint, effective = self.spec.checkpoint, self.result.effective
        with self.clock.span(FIRST_TOUCH):
            if self.spec.device == "cpu":  # of host memory, a load to a GPU takes little more than a ring
                weights = weights_bytes(self.spec.config.loading, checkpoint.weight_bytes, checkpoint.dtype)
                effective["memory_touched_bytes"] = touch_free_memory(
                    TOUCHED_TIMES * (weights + _BESIDES_WEIGHTS_BYTES)
                )
            effective["own_memory_touched_bytes"] = touch_own_memory()

    def _load(self, chosen: "Engine", request: "LoadRequest", meter: "ResourceMeter") -> "EngineModel":
        meter.mark_load_start()
        try:
            with self._sampled("load"):
                loaded = pipeline.load_model(chosen, request, self.clock)
        finally:
            meter.mark_load_end()
            self.result.metrics.update(meter.read_metrics())
            self.result.effective["memory_sources"] = meter.sources
        return loaded

    def _look_at(self, loaded: "EngineModel", meter: "ResourceMeter") -> None:
        from ladezeit.model.tensors import weights_bytes
        from ladezeit.system.page_cache import resident_share
        from ladezeit.timing.resources import GIB, GPU_BYTES_BESIDE_TORCH

        self.result.metrics["cache/resident_after_share"] = resident_share(self.spec.files)
        effective = pipeline.effective_of(loaded)
        self.result.effective.update(effective)
        meter.gpu_beside_torch_bytes = effective.get(GPU_BYTES_BESIDE_TORCH, 0)
        if "offloaded_bytes" in effective:
            self.result.metrics["memory/offloaded_gib"] = sum(effective["offloaded_bytes"].values()) / GIB
        self.result.metrics["memory/weights_gib"] = weights_bytes(loaded.model) / GIB

    def _verify(self, loaded: "EngineModel", wanted: "Expected") -> "Verification | None":
        """Validate as far as asked; None where the model is not what was asked for."""
        from ladezeit.validation.levels import verify_model

        with self._sampled("validation"):
            verification = verify_model(loaded, wanted, self.spec.config.validation, self.clock)
        return verification if self._passed(verification) else None

    def _verify_generation(self, loaded: "EngineModel", wanted: "Expected", before: "Verification") -> bool:
        from ladezeit.validation.levels import verify_generation

        return self._passed(verify_generation(loaded, wanted, before, self.clock))

    def _passed(self, verification: "Verification") -> bool:
        """Note the verification; False where it found something: then all of it is in a file of its own too."""
        self.result.proof = verification.to_dict()
        self.result.metrics["validation/total_s"] = verification.total_s
        self.result.metrics.update(verification.metrics)
        if not verification.ran or verification.passed:
            return True
        self.result.status = Status.wrong
        self.result.reason = verification.reason
        write_atomically(self.spec.folder / FINDINGS_FILE, json.dumps(self.result.proof["findings"], indent=2) + "\n")
        return False

    def _infer(self, loaded: "EngineModel") -> None:
        from ladezeit.runner import generation

        if self.spec.config.inference.new_tokens == 0:
            return
        spoken = generation.generate_tokens(
            loaded.model, self.spec.checkpoint.folder, self.spec.config.inference, self.clock
        )
        self.result.metrics.update(spoken.metrics)
        self.result.metrics["inference/load_and_first_token_s"] = (
            self.clock.duration_s(LOAD) + spoken.metrics["inference/first_token_s"]
        )
        self.result.effective["inference"] = {
            "text": spoken.text,
            "token_ids": spoken.token_ids,
            "prompt_tokens": spoken.prompt_tokens,
        }
        if spoken.text is not None:
            (self.spec.folder / TEXT_FILE).write_text(spoken.text + "\n", encoding="utf-8")
        if self.spec.config.process.kind is ProcessKind.fresh:
            self.result.metrics["cold_start/first_token_s"] = cold_start_s(self.clock)

    def _sampled(self, part: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._profiler is None else self._profiler.sample_block(part)

    def _report(self, error: Exception) -> None:
        self.result.status = status_of(error)
        self.result.reason = str(error).strip().split("\n")[0][:500] or type(error).__name__
        self.result.error = ErrorReport(type(error).__name__, str(error), traceback.format_exc())
        if not isinstance(error, LadezeitError):
            traceback.print_exc()


def _profiler() -> "Profiler":
    from ladezeit.timing.profiler import Profiler

    return Profiler()


def load_metrics(clock: Clock, weight_bytes: int, file_bytes: int) -> dict[str, float]:
    """Return ``load/total_s``, one metric a phase, the unattributed rest and the rate; empty where nothing was loaded.

    A phase's metric is its own time: ``load/<phase>_s`` and ``load/unattributed_s`` add up to ``load/total_s``.
    """
    total_s = clock.duration_s(LOAD)
    if not total_s:
        return {}
    metrics = {"load/total_s": total_s, "load/checkpoint_bytes": float(weight_bytes)}
    metrics["load/file_bytes"] = float(file_bytes)
    metrics["load/gb_per_s"] = weight_bytes / 1e9 / total_s
    for phase in clock.phases:
        if phase.path == LOAD:
            metrics["load/unattributed_s"] = phase.self_s
        elif phase.path.startswith(LOAD + "/"):
            name = f"{phase.path}_s"
            metrics[name] = metrics.get(name, 0.0) + phase.self_s
    return metrics


def cold_start_s(clock: Clock) -> float:
    """Return the seconds from process start to the end of the first token, less what prepares the measurement."""
    ends = [phase.start_s + phase.duration_s for phase in clock.phases if phase.path == FIRST_TOKEN]
    return ends[0] - clock.duration_s(CACHE_CHECK) - clock.duration_s(FIRST_TOUCH)


def status_of(error: BaseException) -> Status:
    """Return the status that an error stands for; what is behind it counts before what it says itself."""
    if ran_out_of_memory(error):
        return Status.oom
    if isinstance(error, NotRunnableError | CombinationError):  # known only once the libraries were asked
        return Status.skipped
    return Status.wrong if isinstance(error, LoadError) else Status.failed
