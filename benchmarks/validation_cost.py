"""What each level of validation costs, by real sweeps: ``experiment=validation_cost`` on one model after the other.

    python benchmarks/validation_cost.py [--model NAME …] [--samples 5] [--output FILE]

The origin's question by figures: all modules, ten and ten, or skipped; and what the levels cost that prove something.
A sample is one process; the levels take turns. What a level needs once for a checkpoint (a reference load, two for
logits) is made before any sample and not counted.

Output: a line a model, and one JSON document as the last line: for each level the median and range of
``validation/total_s`` over the samples that ended ok, and beside them the median of ``load/total_s``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure each model and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2-135m", "qwen2.5-1.5b-shape"])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    report: dict[str, Any] = {"benchmark": "validation_cost", "samples": arguments.samples, "models": {}}
    for name in arguments.model:
        results = swept(name, arguments.samples, arguments.device)
        report["models"][name] = summary(results)
        print(name, json.dumps(report["models"][name]), flush=True)
        facts = results[0]["environment"]
        report["environment"] = {key: facts[key] for key in ("cpu", "gpu", "packages", "python") if key in facts}
    report["load_average"] = [round(load, 1) for load in os.getloadavg()]
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def swept(name: str, samples: int, device: str) -> list[dict[str, Any]]:
    """Run the experiment on one model and return its results; ends where a sample did not end ok."""
    with tempfile.TemporaryDirectory(prefix="ladezeit-validation-") as folder:
        command = [sys.executable, "-m", "ladezeit", "-m", "experiment=validation_cost", f"model={name}"]
        command += [f"sample=range({samples})", f"device={device}", "tracking=none", "ceilings=false"]
        done = subprocess.run([*command, f"outputs={folder}"], capture_output=True, text=True, check=False)
        results = [json.loads(path.read_text()) for path in Path(folder).glob("sweeps/*/[0-9]*/result.json")]
    failed = [result["reason"] for result in results if result["status"] != "ok"]
    if failed or not results:
        sys.exit(f"not every sample of {' '.join(command)} ended ok: {failed}\n{done.stdout}{done.stderr}")
    return results


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what was measured of one model, in seconds."""
    seconds: dict[str, list[float]] = {}
    for result in results:
        seconds.setdefault(result["proof"]["level"], []).append(result["metrics"]["validation/total_s"])
    return {
        "gb": round(results[0]["metrics"]["load/checkpoint_bytes"] / 1e9, 3),
        "load_median_s": round(statistics.median(one["metrics"]["load/total_s"] for one in results), 4),
        "levels": {
            level: {
                "n": len(found),
                "median_s": round(statistics.median(found), 5),
                "range_s": [round(min(found), 5), round(max(found), 5)],
            }
            for level, found in seconds.items()
        },
    }


if __name__ == "__main__":
    main()
