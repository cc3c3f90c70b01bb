"""What gigabytes touched right before a load do to it, and what reading the process's own memory after them mends.

    python benchmarks/own_memory.py [--model qwen2.5-1.5b-shape] [--blocks 7] [--methods transformers,streamed]

A sample touches memory before its clock starts, then reads what its process has in memory (both are
`ladezeit.system.memory_warmup`). Here each method loads in processes of its own, in shuffled blocks, three ways:
nothing touched, free memory touched, and own memory after it. The phases in which nothing is read are Python alone:
they show how fast the process runs.

Output: a line a load, and one JSON document as the last line: by cache state, method and way the median, least and most
of ``load/total_s`` and of those phases, and p of the second and third way (exact Mann-Whitney).
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from scipy.stats import mannwhitneyu

from ladezeit.checkpoint.resolve import prepare_checkpoint
from ladezeit.config.compose import read_option
from ladezeit.loading.base import LoadRequest
from ladezeit.loading.registry import make_engine
from ladezeit.model.classes import model_class
from ladezeit.runner import pipeline
from ladezeit.runner.sample import load_metrics
from ladezeit.system.files import cache_folder
from ladezeit.system.memory_warmup import TOUCHED_TIMES, touch_free_memory, touch_own_memory
from ladezeit.system.page_cache import drop_pages, warm_pages
from ladezeit.timing.clock import Clock

WAYS = ("nothing", "free", "free_then_own")
_READING = ("load/read_s", "load/touch_s", "load/assign_s")


def load_once(model: str, method: str, way: str) -> dict[str, float]:
    """Load in this process, whose libraries are imported first; returns seconds."""
    checkpoint = prepare_checkpoint(read_option("model", model), cache_folder())
    loading = read_option("loading", method)
    model_class(checkpoint.config)
    chosen = make_engine(loading.engine)
    with tempfile.TemporaryDirectory() as scratch:
        request = LoadRequest(checkpoint=checkpoint, loading=loading, device="cpu", scratch=Path(scratch))
        chosen.prepare(request)
        if way != "nothing":
            touch_free_memory(TOUCHED_TIMES * checkpoint.weight_bytes)
        if way == "free_then_own":
            touch_own_memory()
        clock = Clock(time.monotonic_ns(), detail=True)
        pipeline.load_model(chosen, request, clock)
    found = load_metrics(clock, checkpoint.weight_bytes, checkpoint.file_bytes)
    reading = sum(found.get(name, 0.0) for name in _READING)
    return {"total_s": found["load/total_s"], "python_s": found["load/total_s"] - reading}


def main() -> None:
    """Measure in blocks and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-1.5b-shape")
    parser.add_argument("--methods", default="transformers,streamed")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--once", nargs=2, metavar=("METHOD", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(load_once(arguments.model, *arguments.once)))
        return
    found: dict[tuple[str, str, str], list[dict[str, float]]] = defaultdict(list)
    for block in range(arguments.blocks):
        cells = [
            (state, method, way)
            for state in ("cold", "warm")
            for method in arguments.methods.split(",")
            for way in WAYS
        ]
        random.Random(block).shuffle(cells)
        for cell in cells:
            found[cell].append(measured(arguments.model, *cell))
            print(*cell, found[cell][-1], flush=True)
    report = {"benchmark": "own_memory", "model": arguments.model, "cpus": os.cpu_count(), "cells": summary(found)}
    report["load_average"] = os.getloadavg()
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def measured(model: str, state: str, method: str, way: str) -> dict[str, float]:
    """Set the page cache, then load in a process of its own."""
    shards = prepare_checkpoint(read_option("model", model), cache_folder()).shards
    if state == "cold":
        drop_pages(shards)
    else:
        warm_pages(shards)
    command = [sys.executable, __file__, "--model", model, "--once", method, way]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return seconds


def summary(found: dict[tuple[str, str, str], list[dict[str, float]]]) -> dict[str, Any]:
    """Return the figures by cache state and method, then by way."""
    report: dict[str, Any] = defaultdict(dict)
    for (state, method, way), loads in sorted(found.items()):
        figures: dict[str, Any] = {"n": len(loads)}
        for name in ("total_s", "python_s"):
            seconds = [load[name] for load in loads]
            figures[name] = [round(own, 4) for own in (statistics.median(seconds), min(seconds), max(seconds))]
            if way == "free_then_own":
                before = [load[name] for load in found[state, method, "free"]]
                figures[f"{name}_p"] = round(float(mannwhitneyu(before, seconds).pvalue), 4)
        report[f"{state} {method}"][way] = figures
    return report


if __name__ == "__main__":
    main()
