"""Sweeps with known truths: real result files, by ladezeit's own classes, of methods that are made to differ."""

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import example_results as example
from ladezeit.results.records import Result, Status, SweepRecord, save_result

MACHINE: dict[str, Any] = {
    "python": "3.11.7",
    "cpu": {"model": "AMD EPYC 9454", "available": 16},
    "memory": {"limit_bytes": 128 * 2**30},
    "storage": {"source": "/dev/nvme0n1", "filesystem": "ext4"},
    "device": {"name": "cuda:0", "gpu": {"name": "NVIDIA H100 80GB HBM3"}},
    "libraries": {"torch": "2.11.0+cu130", "transformers": "5.17.0", "ladezeit": "0.1.0"},
}

#: The truth: how many times as long as `cuda_fp16` each method takes. `single_device_map` is equal to it.
TRUTH = {"cuda_fp16": 1.0, "single_device_map": 1.0, "transformers": 1.0, "slow": 1.5}
NOISE = 0.02


def sample(
    loading: str,
    number: int,
    factor: float,
    *,
    job: int = 0,
    cache: str = "warm",
    noise: float = NOISE,
    dtype: str = "float16",
    **arguments: Any,
) -> Result:
    """Return an `ok`, proven sample whose load takes `factor` times 4.4 s, with seeded log-normal noise."""
    drawn = random.Random(f"{loading} {cache} {number}").lognormvariate(0.0, noise)
    made = example.result(loading, cache, number, job=job, factor=factor * drawn, **arguments)
    made.environment = dict(MACHINE)
    made.effective |= {"dtype": dtype, "device": "cuda:0", "attention": "sdpa", "ceiling": "storage"}
    made.metrics["load/ceiling_gb_per_s"] = 7.0
    made.metrics["load/ceiling_share"] = made.metrics["load/gb_per_s"] / 7.0
    return made


def wrong(loading: str, number: int, job: int) -> Result:
    """Return a sample that is the fastest of all and loaded the wrong thing."""
    made = sample(loading, number, 0.3, job=job)
    made.status, made.reason = Status.wrong, "2 of 339 tensors lie on the CPU: offload was not asked for"
    assert made.proof is not None
    made.proof |= {"passed": False, "reason": made.reason}
    return made


def unproven(loading: str, number: int, job: int) -> Result:
    """Return a fast sample that nobody checked."""
    made = sample(loading, number, 0.5, job=job)
    made.proof = {"level": "none", "ran": False, "passed": False, "reason": "nothing was looked at", "total_s": 0.0}
    made.config["validation"]["level"] = "none"
    return made


def failed(loading: str, number: int, job: int) -> Result:
    """Return a sample that broke while it loaded."""
    return example.not_ok(Status.failed, "no kernel image is available", loading, cache="warm", sample=number, job=job)


def sweep(samples: int = 5, truth: Mapping[str, float] = TRUTH, *, bad: bool = True) -> list[Result]:
    """Return a whole sweep of `samples` blocks: the methods of `truth`, then one wrong, one failing, one unproven."""
    made: list[Result] = []
    for number in range(samples):
        for loading, factor in truth.items():
            made.append(sample(loading, number, factor, job=len(made)))
        if bad:
            made.append(wrong("offloader", number, len(made)))
            made.append(failed("broken", number, len(made)))
            made.append(unproven("unchecked", number, len(made)))
    return made


def write(folder: Path, results: Iterable[Result], planned: int | None = None, title: str = "planted") -> Path:
    """Write `results` as a sweep's folder holds them, with its record, and return the folder."""
    kept = list(results)
    for result in kept:
        own = folder / str(result.identity.job)
        own.mkdir(parents=True)
        save_result(result, own)
    record = SweepRecord(
        id="2026-03-01_origin",
        title=title,
        command="ladezeit -m …",
        varying=["loading", "sample"],
        samples_planned=len(kept) if planned is None else planned,
        started_at=example.START.isoformat(),
        host="bench-1",
        pid=1,
    )
    record.save_record(folder)
    return folder
