"""Plausible results to test with: data as a worker writes them, not stand-ins for code."""

import copy
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ladezeit.results.records import ErrorReport, Identity, Phase, Result, Status, SweepRecord, save_result

START = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)

CONFIG: dict[str, Any] = {
    "model": {
        "name": "qwen2.5-7b-shape",
        "trust_remote_code": False,
        "architecture": {"hidden_size": 3584, "num_hidden_layers": 28},
        "seed": 0,
        "shard_bytes": 4_000_000_000,
    },
    "loading": {
        "name": "cuda_fp16",
        "engine": "transformers",
        "dtype": "float16",
        "device_map": "cuda",
        "max_memory": {},
        "disable_cpu_offload": True,
        "offload_folder": None,
        "move_to_device": False,
    },
    "validation": {"level": "placement", "k": 10},
    "cache": {"state": "warm"},
    "inference": {"new_tokens": 32, "prompt": "The capital of France is", "chat": True, "token_ids": []},
    "runtime": {"attn_implementation": None, "matmul_precision": None, "threads": None},
    "process": {"kind": "prewarmed", "time_limit_s": 600.0},
    "tracking": {"kind": "sqlite", "uri": None, "experiment": "ladezeit"},
    "device": "cuda:0",
    "sample": 0,
    "phases": True,
    "order_seed": 0,
    "discard_first": True,
    "outputs": "outputs",
    "title": None,
}

ENVIRONMENT: dict[str, Any] = {
    "host": {"name": "bench-1", "cpu": "AMD EPYC 9454", "cores": 16, "memory_gib": 128.0},
    "gpu": {"name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-0f3c", "driver": "570.86", "pcie": "5x16"},
    "versions": {"torch": "2.11.0+cu130", "transformers": "5.17.0", "accelerate": "1.15.0"},
    "checkpoint": {"filesystem": "ext4", "bytes": 15_231_233_024},
}

#: Self times of the phases inside the load, in seconds, by loading method.
LOADS: dict[str, dict[str, float]] = {
    "cuda_fp16": {"config": 0.012, "skeleton": 0.21, "read": 3.9, "finalise": 0.31, "touch": 0.02},
    "device_map_auto": {
        "config": 0.012,
        "skeleton": 0.21,
        "memory_map": 0.16,
        "read": 4.0,
        "finalise": 0.33,
        "touch": 0.02,
    },
    "cpu_then_move": {"config": 0.011, "skeleton": 0.2, "read": 2.4, "move": 6.1, "finalise": 0.3, "touch": 0.02},
    "device_map_auto_max_memory": {"config": 0.012, "skeleton": 0.21, "memory_map": 0.31, "read": 4.1, "touch": 0.02},
    "legacy_manager": {
        "settings": 0.04,
        "config": 0.012,
        "skeleton": 0.21,
        "read": 3.9,
        "finalise": 0.31,
        "touch": 0.02,
        "module_walk": 170.2,
    },
}
UNATTRIBUTED_S = 0.031


def phases_of(load: dict[str, float], factor: float, *, fresh: bool) -> list[Phase]:
    """Return the phases of a sample in the order they close, as the clock writes them."""
    phases: list[Phase] = []
    now = 0.0

    def span(path: str, duration_s: float, self_s: float | None = None) -> None:
        nonlocal now
        phases.append(Phase(path, round(now, 9), round(duration_s, 9), round(self_s or duration_s, 9)))
        now += duration_s

    span("process_start", 0.04 if fresh else 0.004)
    if fresh:
        span("import", 5.1)
    span("cuda_context", 0.36)
    span("cache_check", 0.021)
    begin = now
    for name, duration_s in load.items():
        span(f"load/{name}", duration_s * factor)
    now += UNATTRIBUTED_S
    phases.append(Phase("load", round(begin, 9), round(now - begin, 9), UNATTRIBUTED_S))
    span("validation", 0.061 * factor)
    span("inference/first_token", 0.19 * factor)
    span("inference/second_token", 0.023 * factor)
    span("inference/rest", 0.61 * factor)
    return phases


def result(
    loading: str = "cuda_fp16",
    cache: str = "warm",
    sample: int = 0,
    *,
    job: int = 0,
    sweep: str | None = "2026-03-01_origin",
    label: str | None = None,
    fresh: bool = False,
    factor: float | None = None,
) -> Result:
    """Return an `ok` result; equal arguments give equal results."""
    noise = random.Random(f"{loading} {cache} {sample}")
    factor = factor if factor is not None else (2.6 if cache == "cold" else 1.0) * noise.uniform(0.985, 1.03)
    config = copy.deepcopy(CONFIG)
    config["loading"]["name"] = loading
    config["loading"]["engine"] = "legacy_manager" if loading == "legacy_manager" else "transformers"
    config["cache"]["state"] = cache
    config["process"]["kind"] = "fresh" if fresh else "prewarmed"
    config["sample"] = sample
    phases = phases_of(LOADS.get(loading, LOADS["cuda_fp16"]), factor, fresh=fresh)
    overrides = [f"loading={loading}", f"cache={cache}", f"sample={sample}"]
    return Result(
        status=Status.ok,
        identity=Identity(
            point=f"{loading}-{cache}",
            sample=sample,
            job=job,
            label=label if label is not None else f"{cache}·{loading}"[:17] + f"·#{sample}",
            overrides=overrides,
            command="ladezeit model=qwen2.5-7b-shape " + " ".join(overrides),
            sweep=sweep,
        ),
        config=config,
        started_at=(START + timedelta(seconds=200 * job)).isoformat(timespec="milliseconds"),
        effective={"dtype": "float16", "device": "cuda:0", "inference": {"text": " Paris.", "token_ids": [12, 3]}},
        phases=phases,
        metrics=metrics_of(phases, cold=cache == "cold"),
        proof={"level": "placement", "ran": True, "passed": True, "total_s": 0.061, "parameters": 339},
        environment=copy.deepcopy(ENVIRONMENT),
    )


def metrics_of(phases: list[Phase], *, cold: bool) -> dict[str, float]:
    """Return the metrics that belong to `phases`."""
    spans = {phase.path: phase for phase in phases}
    total_s = spans["load"].duration_s
    metrics = {
        "load/total_s": total_s,
        "load/checkpoint_bytes": 15_231_233_024.0,
        "load/gb_per_s": 15.231233024 / total_s,
        "load/unattributed_s": spans["load"].self_s,
        "load/major_page_faults": 3720.0 if cold else 2.0,
        "load/minor_page_faults": 371_204.0,
        "load/storage_read_bytes": 15_231_250_432.0 if cold else 0.0,
        "memory/gpu_allocated_peak_gib": 14.188123456789,
        "memory/gpu_reserved_peak_gib": 14.3125,
        "memory/gpu_used_gib": 14.79,
        "memory/host_peak_rss_gib": 3.217,
        "cache/resident_before_share": 0.0 if cold else 1.0,
        "cache/resident_after_share": 1.0,
        "validation/total_s": spans["validation"].duration_s,
        "inference/first_token_s": spans["inference/first_token"].duration_s,
        "inference/second_token_s": spans["inference/second_token"].duration_s,
        "inference/tokens_per_s": 43.1,
        "sample/wall_s": max(phase.start_s + phase.duration_s for phase in phases) + 0.3,
    }
    metrics |= {f"{p.path}_s": p.self_s for p in phases if p.path.startswith("load/")}
    if "import" in spans:
        first = spans["inference/first_token"]
        metrics["cold_start/first_token_s"] = first.start_s + first.duration_s
    return metrics


def not_ok(status: Status, reason: str, loading: str = "device_map_auto", **arguments: Any) -> Result:
    """Return a result that ended in the middle of its load with `status`."""
    broken = result(loading, **arguments)
    kept = [p for p in broken.phases if p.path in ("process_start", "cuda_context", "cache_check", "load/config")]
    broken.status, broken.reason = status, reason
    broken.phases = [] if status is Status.skipped else kept
    broken.metrics = {} if status is Status.skipped else {"sample/wall_s": 2.5, "cache/resident_before_share": 1.0}
    broken.proof = None
    broken.effective = {}
    if status in (Status.failed, Status.oom):
        kind = "OutOfMemoryError" if status is Status.oom else "RuntimeError"
        broken.error = ErrorReport(kind, reason, f"Traceback (most recent call last):\n  …\n{kind}: {reason}\n")
    return broken


def record(sweep: str = "2026-03-01_origin", samples_planned: int = 40) -> SweepRecord:
    """Return the record of a sweep over loading methods and cache states that no store knows yet."""
    return SweepRecord(
        id=sweep,
        title="origin_case",
        command="ladezeit experiment=origin_case",
        varying=["cache", "loading", "sample"],
        samples_planned=samples_planned,
        started_at=START.isoformat(timespec="milliseconds"),
        host="bench-1",
        pid=4711,
        git_commit="7bde112f0c0ffee0000000000000000000000000",
    )


def sweep_results(samples: int = 5) -> Iterator[Result]:
    """Yield the results of a whole sweep, some of them not ok."""
    job = 0
    for sample in range(samples):
        for cache in ("cold", "warm"):
            for loading in LOADS:
                if loading == "cpu_then_move" and cache == "cold":
                    status = Status.oom if sample == 1 else Status.ok
                    reason = "CUDA out of memory: 14.2 GiB wanted, 11.0 GiB free"
                    arguments: dict[str, Any] = {"cache": cache, "sample": sample, "job": job}
                    yield (
                        not_ok(status, reason, loading, **arguments)
                        if status is Status.oom
                        else result(loading, **arguments)
                    )
                elif loading == "device_map_auto_max_memory" and cache == "cold":
                    reason = "max_memory of 20 GiB on device 0: this GPU has 16 GiB"
                    yield not_ok(Status.skipped, reason, loading, cache=cache, sample=sample, job=job)
                else:
                    yield result(loading, cache, sample, job=job)
                job += 1


def write_sample(folder: Path, written: Result) -> Path:
    """Write the files of a sample as supervisor and worker leave them, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    hydra = folder / ".hydra"
    hydra.mkdir(exist_ok=True)
    (hydra / "config.yaml").write_text("model:\n  name: qwen2.5-7b-shape\n", encoding="utf-8")
    (hydra / "overrides.yaml").write_text("".join(f"- {o}\n" for o in written.identity.overrides), encoding="utf-8")
    (folder / "worker.log").write_text("loading 4 shards\n", encoding="utf-8")
    if written.status is Status.ok:
        (folder / "generated.txt").write_text(" Paris.\n", encoding="utf-8")
    save_result(written, folder)
    return folder
