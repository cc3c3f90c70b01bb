"""How long do 5,000 samples take to compare and to report? Real result files, the installed command, a fresh process.

    python benchmarks/results_speed.py [--samples 5000] [--tries 3]     # alone on the machine, please

The samples are made by ladezeit's own classes (two cache states, twenty methods, seeded log-normal times, phases that
add up, one method unproven) and written as a sweep writes them; making them is not timed. The whole process is timed:
imports, reading, statistics, drawing, writing. The last line is one JSON document: the best try of each command, in
seconds by the wall's clock and of the processor.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ladezeit.results.records import Identity, Phase, Result, Status, SweepRecord, save_result

METHODS = 20
CACHES = {"cold": 2.6, "warm": 1.0}
SWEEP = "2026-01-01_speed"
ENVIRONMENT = {
    "cpu": {"model": "made", "available": 8},
    "memory": {"limit_bytes": 64 * 2**30},
    "storage": {"source": "/dev/nvme0n1", "filesystem": "ext4"},
    "libraries": {"torch": "2.13.0", "transformers": "5.23.0"},
}
PHASES = {"load/config": 0.01, "load/skeleton": 0.2, "load/plan": 0.3, "load/read": 3.0, "load/touch": 0.1}


def sample(method: int, cache: str, number: int, job: int, rng: random.Random) -> Result:
    """Return one proven sample; the methods differ by 2 % each."""
    factor = CACHES[cache] * (1 + 0.02 * method) * rng.lognormvariate(0, 0.05)
    now, phases = 0.5, [Phase("process_start", 0.0, 0.5, 0.5)]
    for path, share in PHASES.items():
        phases.append(Phase(path, now, share * factor, share * factor))
        now += share * factor
    total_s = now - 0.5 + 0.05
    phases.append(Phase("load", 0.5, total_s, 0.05))
    level = "none" if method == METHODS - 1 else "placement"
    overrides = [f"loading=method_{method}", f"cache={cache}", f"sample={number}"]
    return Result(
        status=Status.ok,
        identity=Identity(f"{method}-{cache}", number, job, f"#{number}", overrides, "ladezeit …", SWEEP),
        config={
            "model": {"name": "made"},
            "loading": {"name": f"method_{method}", "engine": "made"},
            "cache": {"state": cache},
            "process": {"kind": "prewarmed"},
            "validation": {"level": level},
            "device": "cpu",
        },
        started_at=f"2026-01-01T00:00:00.{job % 1000:03d}+00:00",
        effective={"dtype": "bfloat16", "device": "cpu", "ceiling": "storage"},
        phases=phases,
        metrics={
            "load/total_s": total_s,
            "load/ceiling_gb_per_s": 7.0,
            "load/ceiling_share": 1.4 / total_s,
            "memory/host_peak_rss_gib": 3.0 + rng.random() / 10,
            "validation/total_s": 0.05 * factor,
        },
        proof={"level": level, "ran": level != "none", "passed": level != "none", "reason": "", "total_s": 0.05},
        environment=ENVIRONMENT,
    )


def make(folder: Path, samples: int) -> None:
    """Write a sweep of `samples` samples into `folder`."""
    rng, job = random.Random(1), 0
    for number in range(samples // (METHODS * len(CACHES))):
        for cache in CACHES:
            for method in range(METHODS):
                own = folder / str(job)
                own.mkdir(parents=True)
                save_result(sample(method, cache, number, job, rng), own)
                job += 1
    varying = ["cache", "loading", "sample"]
    SweepRecord(SWEEP, "speed", "ladezeit -m …", varying, job, "2026-01-01T00:00:00+00:00", "made", 1).save_record(
        folder
    )


def timed(arguments: list[str]) -> dict[str, float]:
    """Run the console script; return the seconds it took by the wall's clock and of the processor."""
    script = Path(sys.executable).with_name("ladezeit-results")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([str(script), *arguments], check=True, stdout=subprocess.DEVNULL)
    wall_s = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(wall_s, 2), "cpu_s": round(cpu_s, 2)}


def main() -> None:
    """Make the samples, time both commands, print each try and one line of JSON."""
    parser = argparse.ArgumentParser(description="Time compare and report over many samples.")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--tries", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="ladezeit-speed-") as place:
        sweep = Path(place) / "sweep"
        make(sweep, options.samples)
        for _ in range(options.tries):
            for name, more in (("compare", ["--format", "json"]), ("report", ["--output", f"{place}/report"])):
                found.setdefault(name, []).append(timed([name, str(sweep), *more]))
                print(name, found[name][-1])
    best = {name: min(tries, key=lambda own: own["wall_s"]) for name, tries in found.items()}
    load = os.getloadavg()[0]
    print(json.dumps({"samples": options.samples, "cores": os.cpu_count(), "load_average": round(load, 1), **best}))


if __name__ == "__main__":
    main()
