"""Every engine side by side: in the same blocks, beside the ceiling, until every weight is touched, all bits proven.

    python benchmarks/engines.py [--cells 1.5b-cold,1.5b-warm,…] [--blocks 7] [--output FOLDER]

A *cell* is one model, cache state and dtype, in which methods compete. A *block* measures each method of a cell once,
in random order, right after the ceilings were measured again: so a share of the ceiling compares neighbours in time.
Each load is a process of its own. Nothing is left out: a sample that is not ``ok`` is counted with its reason.

Output: FOLDER ``engines-<device>.jsonl`` gets a line a sample, ``engines-<device>.md`` a table for each cell; the last
line is one JSON document: for each cell the medians, and `streamed` and `auto` against the best of the others.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ON_CPU = (
    "transformers,safetensors_mmap,safetensors_pread,accelerate,fastsafetensors,runai_streamer,tensorizer,torch_dcp"
)
ON_CPU += ",streamed,auto"
ON_GPU = "transformers,transformers_sync,safetensors_mmap,safetensors_prefetch,accelerate,fastsafetensors"
ON_GPU += ",fastsafetensors_gds,runai_streamer,instanttensor,instanttensor_buffered,torch_dcp,streamed,auto"
CASTING = "transformers,safetensors_mmap,fastsafetensors,runai_streamer,streamed,auto"
FASTEST = "transformers,safetensors_mmap,streamed,auto"
READINGS = "by_residency,direct,buffered,mapped"


@dataclass(frozen=True)
class Cell:
    """Methods that compete on one model in one state; `extra` are more overrides, swept over where they have commas."""

    model: str
    cache: str
    methods: str
    dtype: str = "auto"
    extra: tuple[str, ...] = ()


def cells(device: str) -> dict[str, Cell]:
    """Return all cells of a device by name."""
    if device == "cuda":
        large = "qwen2.5-7b-shape"
        return {
            "7b-warm": Cell(large, "warm", ON_GPU),
            "7b-cold": Cell(large, "cold", ON_GPU),
            "7b-half": Cell(large, "half", "transformers,fastsafetensors,instanttensor,streamed,auto"),
            "7b-warm-float16": Cell(large, "warm", "transformers,fastsafetensors,streamed,auto", "float16"),
            "moe-warm": Cell("qwen3-moe-shape", "warm", ON_GPU),
        }
    middle, experts = "qwen2.5-1.5b-shape", "qwen3-moe-shape"
    return {
        "1.5b-cold": Cell(middle, "cold", ON_CPU),
        "1.5b-cold-fastest": Cell(middle, "cold", "transformers,runai_streamer,streamed,auto"),
        "1.5b-warm": Cell(middle, "warm", ON_CPU),
        "1.5b-warm-fastest": Cell(middle, "warm", FASTEST),
        "1.5b-half": Cell(middle, "half", "transformers,safetensors_mmap,fastsafetensors,auto"),
        "1.5b-half-readings": Cell(middle, "half", "streamed", extra=(f"loading.reading={READINGS}",)),
        "1.5b-warm-float16": Cell(middle, "warm", CASTING, "float16"),
        "1.5b-warm-float16-fastest": Cell(middle, "warm", FASTEST, "float16"),
        "1.5b-warm-float32": Cell(middle, "warm", CASTING, "float32"),
        "1.5b-warm-float32-fastest": Cell(middle, "warm", FASTEST, "float32"),
        "1.5b-cold-float16": Cell(middle, "cold", CASTING, "float16"),
        "moe-warm": Cell(experts, "warm", ON_CPU),
        "moe-warm-fastest": Cell(experts, "warm", FASTEST),
        "moe-cold": Cell(experts, "cold", ON_CPU),
        "smollm2-warm": Cell("smollm2-135m", "warm", f"{ON_CPU},gguf"),
        "smollm2-cold": Cell("smollm2-135m", "cold", f"{ON_CPU},gguf"),
        "tiny-warm": Cell("tiny", "warm", f"{ON_CPU},gguf"),
        "1.5b-warm-gguf": Cell(middle, "warm", "transformers,gguf"),
    }


def measure(cell: Cell, block: int, device: str) -> list[dict]:
    """Measure each method of a cell once and return the results."""
    with tempfile.TemporaryDirectory(prefix="ladezeit-engines-") as folder:
        command = [sys.executable, "-m", "ladezeit", "-m", f"model={cell.model}", f"cache={cell.cache}"]
        command += [f"loading={cell.methods}", f"loading.dtype={cell.dtype}", *cell.extra, f"device={device}"]
        command += ["validation=content", "inference=none", "process=prewarmed", "tracking=none"]
        command += [f"sample={block}", f"order_seed={block}", "ceilings=true", f"outputs={folder}"]
        command += [f"discard_first={str(block == 0).lower()}"]  # once is enough for the libraries' own files
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        results = [json.loads(path.read_text()) for path in Path(folder).glob("sweeps/*/[0-9]*/result.json")]
    if not results:
        sys.exit(f"nothing was measured by {' '.join(command)}:\n{done.stdout}{done.stderr}")
    return results


def row(name: str, cell: Cell, block: int, result: dict) -> dict:
    """Return one sample as it is kept."""
    metrics, loading = result["metrics"], result["config"]["loading"]
    method = loading["name"] + (f" {loading['reading']}" if cell.extra else "")
    kept = {"cell": name, "method": method, "block": block, "status": result["status"], "reason": result["reason"]}
    kept |= {key: round(value, 5) for key, value in metrics.items() if key.startswith(("load/", "memory/", "cache/"))}
    kept["ceiling"] = result["effective"].get("ceiling")
    kept["load_average"] = round(os.getloadavg()[0], 2)
    if "auto" in result["effective"]:
        kept["auto"] = result["effective"]["auto"]["engine"]
    return kept


def summary(rows: list[dict]) -> dict:
    """Return the figures of one cell by method, and how our two compare with the best of the others."""
    totals: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    for one in rows:
        if one["status"] == "ok":
            totals.setdefault(one["method"], []).append(one["load/total_s"])
            shares.setdefault(one["method"], []).append(one.get("load/ceiling_share", float("nan")))
    methods = {
        method: {
            "n": len(found),
            "median_s": round(statistics.median(found), 4),
            "range_s": [round(min(found), 4), round(max(found), 4)],
            "ceiling_share": round(statistics.median(shares[method]), 3),
        }
        for method, found in sorted(totals.items(), key=lambda item: statistics.median(item[1]))
    }
    best = min((name for name in methods if name not in ("streamed", "auto")), key=lambda m: methods[m]["median_s"])
    report = {"methods": methods, "best_of_the_others": best}
    for ours in ("streamed", "auto"):
        if ours in methods:
            report[f"{ours}_over_best"] = round(methods[ours]["median_s"] / methods[best]["median_s"], 3)
            if "transformers" in methods:
                faster = methods["transformers"]["median_s"] / methods[ours]["median_s"]
                report[f"transformers_over_{ours}"] = round(faster, 2)
    report["not_ok"] = Counter(f"{r['method']}: {r['status']}: {r['reason']}" for r in rows if r["status"] != "ok")
    return report


def as_markdown(name: str, cell: Cell, report: dict) -> str:
    """Return one cell's table."""
    dtype = "the checkpoint's dtype" if cell.dtype == "auto" else cell.dtype
    lines = [f"### {name}: {cell.model}, {cell.cache}, {dtype}", ""]
    lines += ["| method | n | load, median | least – most | share of the ceiling |", "|---|---|---|---|---|"]
    for method, found in report["methods"].items():
        least, most = found["range_s"]
        share = f"{found['ceiling_share']:.0%}" if found["ceiling_share"] == found["ceiling_share"] else "–"
        lines.append(f"| {method} | {found['n']} | {found['median_s']:.3f} s | {least:.3f} – {most:.3f} s | {share} |")
    lines += [f"\n{count} × {text}" for text, count in report["not_ok"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all cells, block by block, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cells", help="names, comma-separated; all by default")
    parser.add_argument("--blocks", type=int, default=7, help="0: only report what the raw file holds")
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    arguments = parser.parse_args()
    there = cells(arguments.device)
    names = arguments.cells.split(",") if arguments.cells else list(there)
    arguments.output.mkdir(parents=True, exist_ok=True)
    raw = arguments.output / f"engines-{arguments.device}.jsonl"
    with raw.open("a") as file:
        for name in names if arguments.blocks else ():
            for block in range(arguments.blocks):
                for result in measure(there[name], block, arguments.device):
                    file.write(json.dumps(row(name, there[name], block, result)) + "\n")
                file.flush()
            print(name, "done", flush=True)
    rows: dict[str, list[dict]] = {}
    for line in raw.read_text().splitlines():
        one = json.loads(line)
        rows.setdefault(one["cell"], []).append(one)
    reports = {name: summary(rows[name]) for name in there if name in rows}
    tables = [as_markdown(name, there[name], report) for name, report in reports.items()]
    (arguments.output / f"engines-{arguments.device}.md").write_text("\n".join(tables))
    print("\n".join(tables))
    print(json.dumps({"benchmark": "engines", "cells": reports}))


if __name__ == "__main__":
    main()
