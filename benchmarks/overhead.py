"""What ladezeit itself costs a sample: the wall time of a prewarmed job less what it was asked to do.

    python benchmarks/overhead.py [--samples 20] [--output FILE]

A sample's job is composed by Hydra, planned, forked, measured, drawn, and logged to MLflow. Its own cost is the time
from one job's end to the next one's, less cache preparation, load, validation and inference. It is paid between
measurements, never inside one; it decides how many samples a night holds.

Output: a table, and one JSON document as the last line: median, least and largest seconds a sample, with the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ASKED_FOR = ("cache_check", "first_touch", "load", "validation", "inference/")


def asked_for_s(result: dict) -> float:
    """Return the seconds of a sample that were spent on what it was asked to do."""
    phases = result["phases"]
    roots = sum(
        p["duration_s"] for p in phases if p["path"].startswith(ASKED_FOR) and not p["path"].startswith("load/")
    )
    return roots + result["environment"]["cache_preparation"]["seconds"]


def own_costs_s(sweep: Path) -> list[float]:
    """Return each sample's own cost in seconds: from the previous sample's last file to this one's, less the asked."""
    costs = []
    before = None
    folders = sorted((folder for folder in sweep.iterdir() if folder.name.isdigit()), key=lambda f: int(f.name))
    for folder in folders:
        end = (folder / ".mlflow_run_id").stat().st_mtime  # the last file of a sample: it is logged
        if before is not None:
            result = json.loads((folder / "result.json").read_text())
            costs.append(end - before - asked_for_s(result))
        before = end
    return costs


def main() -> None:
    """Run the sweep and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ladezeit", "-m", "model=smollm2-135m", "process=prewarmed", "cache=warm"]
        command += [f"sample=range({arguments.samples})", "loading=transformers", f"outputs={folder}"]
        subprocess.run(command, check=True)
        (sweep,) = (Path(folder) / "sweeps").iterdir()
        costs = own_costs_s(sweep)
        machine = json.loads((sweep / "0" / "result.json").read_text())["environment"]
    report = {
        "benchmark": "overhead",
        "command": " ".join(part for part in command[1:] if not part.startswith("outputs=")),
        "n": len(costs),
        "median_s": round(statistics.median(costs), 4),
        "least_s": round(min(costs), 4),
        "largest_s": round(max(costs), 4),
        "machine": {key: machine[key] for key in ("cpu", "memory", "device", "libraries", "python")},
        "load_average": os.getloadavg(),
    }
    print(f"own cost of a prewarmed sample: median {report['median_s']} s, {report['least_s']}–{report['largest_s']} s")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
