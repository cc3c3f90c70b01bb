"""Whether looking at phases costs anything, whether they explain the load, and whether cold is cold.

    python benchmarks/phases.py [--model qwen2.5-1.5b-shape] [--samples 10] [--output FILE]

One interleaved sweep over phases=on,off and cache=cold,warm with the default method. Reported: the ratio of the medians
off/on with the exact Mann-Whitney p of the two, the share that no phase explains, resident shares before the load, and
how many times slower cold is than warm.

Output: a table, and one JSON document as the last line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from scipy.stats import mannwhitneyu


def main() -> None:
    """Run the sweep and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-1.5b-shape")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ladezeit", "-m", f"model={arguments.model}", "process=prewarmed"]
        command += ["inference=none", "phases=on,off", "cache=cold,warm", f"sample=range({arguments.samples})"]
        command += ["tracking=none", f"outputs={folder}"]
        subprocess.run(command, check=True)
        (sweep,) = (Path(folder) / "sweeps").iterdir()
        results = [json.loads(path.read_text()) for path in sweep.glob("[0-9]*/result.json")]
    shown = " ".join(part for part in command[1:] if not part.startswith("outputs="))
    report = {"benchmark": "phases", "command": shown, "states": {}}
    for state in ("cold", "warm"):
        report["states"][state] = compare([r for r in results if r["config"]["cache"]["state"] == state])
    states = report["states"]
    report["cold_over_warm"] = round(states["cold"]["on_median_s"] / states["warm"]["on_median_s"], 2)
    machine = results[0]["environment"]
    report["machine"] = {key: machine[key] for key in ("cpu", "memory", "storage", "device", "libraries", "python")}
    report["load_average"] = os.getloadavg()
    for state, found in states.items():
        print(state, json.dumps(found))
    print("cold over warm:", report["cold_over_warm"])
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def compare(results: list[dict]) -> dict:
    """Return what one cache state says about observing phases."""
    on = [r["metrics"]["load/total_s"] for r in results if r["config"]["phases"] and r["status"] == "ok"]
    off = [r["metrics"]["load/total_s"] for r in results if not r["config"]["phases"] and r["status"] == "ok"]
    observed = [r["metrics"] for r in results if r["config"]["phases"] and r["status"] == "ok"]
    unexplained = [m["load/unattributed_s"] / m["load/total_s"] for m in observed]
    return {
        "n_on": len(on),
        "n_off": len(off),
        "on_median_s": round(statistics.median(on), 4),
        "on_range_s": [round(min(on), 4), round(max(on), 4)],
        "off_median_s": round(statistics.median(off), 4),
        "off_range_s": [round(min(off), 4), round(max(off), 4)],
        "off_over_on": round(statistics.median(off) / statistics.median(on), 4),
        "mann_whitney_p": round(float(mannwhitneyu(on, off).pvalue), 4),
        "unattributed_share_median": round(statistics.median(unexplained), 5),
        "unattributed_share_largest": round(max(unexplained), 5),
        "resident_before_share_largest": max(r["metrics"]["cache/resident_before_share"] for r in results),
        "resident_before_share_least": min(r["metrics"]["cache/resident_before_share"] for r in results),
        "touch_median_s": round(statistics.median(m["load/touch_s"] for m in observed), 4),
    }


if __name__ == "__main__":
    main()
