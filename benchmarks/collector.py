"""What Python's garbage collector takes of a load in a program of one's own, and what is saved without it.

    python benchmarks/collector.py [--model qwen2.5-1.5b-shape] [--tries 7] [--output FILE]

A program that has imported torch and transformers holds about a million objects. The collector looks through all of
them when enough new ones came, and a load makes enough: whether that falls into the load or just before it is chance,
and the same in every run of one program. Each try is a new process that imports the libraries, warms the page cache,
loads once and generates one token, so that work that was only put off would show there; ways in shuffled order. Compare
a way with itself: from_pretrained only maps the file, and its first token pays for the pages.

Output: a line a try, and one JSON document as the last line: by way the seconds of load and first token (median, least,
most), and the seconds of full collections in each.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

WAYS = {
    "from_pretrained": "transformers",
    "from_pretrained after gc.freeze()": "transformers",
    "ladezeit.load": "streamed",
    "ladezeit.load without its pause": "streamed",
}

PROGRAM = """
import contextlib, gc, json, sys, time
import torch, transformers
import ladezeit
from ladezeit.system.files import cache_folder
from ladezeit.checkpoint.resolve import prepare_checkpoint
from ladezeit.config.compose import read_option
from ladezeit.loading import build_model as assemble
way, model, method = sys.argv[1:]
transformers.AutoModelForCausalLM, transformers.AutoTokenizer
taken, began = {"load": 0.0, "first_token": 0.0}, {}
part = None
def told(border, about):
    if border == "start":
        began["s"] = time.perf_counter()
    elif part is not None and about["generation"] == 2:
        taken[part] += time.perf_counter() - began["s"]
gc.callbacks.append(told)
if "without its pause" in way:
    assemble.collector_paused = contextlib.nullcontext
ladezeit.prefetch(model)
checkpoint = prepare_checkpoint(read_option("model", model), cache_folder())
model_class = getattr(transformers, checkpoint.config["architectures"][0])
if "freeze" in way:
    gc.freeze()
started = time.perf_counter()
part = "load"
if method == "transformers":
    loaded = model_class.from_pretrained(str(checkpoint.folder), device_map="cpu")
else:
    loaded = ladezeit.load(model, loading=method, device="cpu").model
load_s = time.perf_counter() - started
part = "first_token"
started = time.perf_counter()
loaded.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1)
print(json.dumps({"load_s": load_s, "first_token_s": time.perf_counter() - started, "collections_s": taken}))
"""


def once(way: str, model: str) -> dict[str, Any]:
    """Return the seconds of one try in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, way, model, WAYS[way]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{way} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def figures(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {name: round(of(values), 4) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


def main() -> None:
    """Try every way in turn and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-1.5b-shape")
    parser.add_argument("--tries", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    tries: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(arguments.tries):
        order = list(WAYS)
        random.Random(number).shuffle(order)
        for way in order:
            tries[way].append(once(way, arguments.model))
            print(way, json.dumps(tries[way][-1]), flush=True)
    report: dict[str, Any] = {"benchmark": "collector", "model": arguments.model, "tries": arguments.tries}
    report |= {"cpus": os.cpu_count(), "load_average": os.getloadavg(), "ways": {}}
    for way, found in tries.items():
        report["ways"][way] = {
            "load_s": figures([one["load_s"] for one in found]),
            "full_collections_in_load_s": figures([one["collections_s"]["load"] for one in found]),
            "first_token_s": figures([one["first_token_s"] for one in found]),
            "full_collections_in_first_token_s": figures([one["collections_s"]["first_token"] for one in found]),
        }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
