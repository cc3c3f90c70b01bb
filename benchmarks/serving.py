"""What `ladezeit.load` costs a program beside the engine's own load, and what importing ladezeit costs.

    python benchmarks/serving.py [--samples 20] [--model smollm2-135m] [--output FILE]

In one process, warm: the engine alone (its request made and prepared before), `load`, and `from_pretrained`, by turns,
so that whatever drifts meets all alike. What `load` adds is its whole time less its own ``load`` phase: finding and
checking the checkpoint, the choice, the proof. Imports are measured in processes of their own, against an empty one.

Output: a table, and one JSON document as the last line: medians and ranges in seconds, with the machine.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ladezeit


def engine_alone(loaded: Any) -> Callable[[], float]:
    """Return what loads the same model by the same engine, with everything else done before; it returns seconds."""
    from ladezeit.loading.registry import make_engine
    from ladezeit.runner import pipeline
    from ladezeit.timing.clock import Clock

    scratch = Path(tempfile.mkdtemp(prefix="ladezeit-benchmark-"))
    request = pipeline.make_request(loaded.config, loaded.checkpoint, loaded.config.device, scratch)
    chosen = make_engine(loaded.config.loading.engine)
    chosen.prepare(request)

    def run() -> float:
        clock = Clock(time.monotonic_ns())
        pipeline.load_model(chosen, request, clock)
        return clock.duration_s("load")

    return run


def by_turns(model: str, samples: int) -> dict[str, list[float]]:
    """Return the seconds of each way, and what `load` adds to its own engine's."""
    from transformers import AutoModelForCausalLM

    first = ladezeit.load(model)  # imports, page cache
    alone, folder = engine_alone(first), first.checkpoint.folder
    found: dict[str, list[float]] = {"engine": [], "load": [], "load_adds": [], "from_pretrained": []}
    for _ in range(samples):
        gc.collect()
        found["engine"].append(alone())
        gc.collect()
        loaded = ladezeit.load(model)
        found["load"].append(loaded.total_s)
        found["load_adds"].append(loaded.total_s - loaded.load_s)
        del loaded
        gc.collect()
        started = time.monotonic()
        AutoModelForCausalLM.from_pretrained(folder)
        found["from_pretrained"].append(time.monotonic() - started)
    return found


def process_s(code: str) -> float:
    """Return the seconds that a new interpreter takes for `code`."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.monotonic() - started


def imports(samples: int) -> dict[str, list[float]]:
    """Return the seconds of an empty interpreter and of one that imports ladezeit, by turns."""
    found: dict[str, list[float]] = {"python": [], "import_ladezeit": []}
    for _ in range(samples):
        found["python"].append(process_s("pass"))
        found["import_ladezeit"].append(process_s("import ladezeit"))
    return found


def summary(values: list[float]) -> dict[str, float]:
    """Return median, least and largest."""
    return {
        "median_s": round(statistics.median(values), 5),
        "least_s": round(min(values), 5),
        "largest_s": round(max(values), 5),
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    before = os.getloadavg()
    measured = by_turns(arguments.model, arguments.samples) | imports(arguments.samples)
    ways = {name: summary(values) for name, values in measured.items()}
    for name, row in ways.items():
        print(f"{name:<16} {row['median_s']:9.4f} s  ({row['least_s']:.4f} to {row['largest_s']:.4f})")
    report = {
        "benchmark": "serving",
        "model": arguments.model,
        "n": arguments.samples,
        "ways": ways,
        "processors": os.cpu_count(),
        "python": sys.version.split()[0],
        "load_average_before_and_after": [before, os.getloadavg()],
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
