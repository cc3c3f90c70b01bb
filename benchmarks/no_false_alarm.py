"""Whether a right load is ever called wrong: every engine, model after model, by real sweeps with ``validation=full``.

    python benchmarks/no_false_alarm.py [--model NAME …] [--methods NAME,…] [--samples 5] [--output FOLDER]

A proof that cries wolf is switched off. So each method loads each model several times, each time in a process of its
own, and every sample must end ``ok``: bits, placement and what the model says. What a machine cannot run is counted
with its reason. Nothing is timed, and computing takes one thread, so other work on the machine does no harm.

Output: FOLDER ``no_false_alarm.json`` and ``no_false_alarm.md``, a table of counts; methods that are loaded again
replace what the files had of them for that model. The last line is one JSON document. The exit code is 1 where a sample
was wrong.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

METHODS = (
    "transformers,transformers_sync,transformers_no_mmap,legacy_manager,accelerate,safetensors_mmap,safetensors_pread,"
    "fastsafetensors,runai_streamer,torch_dcp,tensorizer,tensorizer_verify_hash,gguf,streamed,auto,"
    "bitsandbytes_8bit,bitsandbytes_4bit,torchao_int8"
)
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "accelerate",
    "fastsafetensors",
    "runai-model-streamer",
    "tensorizer",
    "bitsandbytes",
    "torchao",
)


def main() -> None:
    """Load, count and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["tiny", "smollm2-135m", "qwen2.5-0.5b-shape"])
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path = arguments.output / "no_false_alarm.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"models": {}}
    report |= {"benchmark": "no_false_alarm", "packages": {name: version(name) for name in PACKAGES}}
    for name in arguments.model:
        asked = ["-m", f"model={name}", f"loading={arguments.methods}", f"sample=range({arguments.samples})"]
        asked += ["loading.dtype=auto", "validation=full", "inference=none", "process=prewarmed", "cache=as_is"]
        asked += ["runtime.threads=1", f"device={arguments.device}", "tracking=none", "ceilings=false"]
        before = report["models"].get(name, {})
        report["models"][name] = merged(before, {"commands": [f"ladezeit {' '.join(asked)}"], **counted(asked)})
        path.write_text(json.dumps(report, indent=2) + "\n")
        path.with_suffix(".md").write_text(table(report))
    print(table(report))
    print(json.dumps(report))
    sys.exit(int(total(report["models"])["wrong"] > 0))


def counted(asked: list[str]) -> dict[str, Any]:
    """Run one sweep; return how its samples ended by method, and why those that are not ok did."""
    with tempfile.TemporaryDirectory(prefix="ladezeit-alarm-") as folder:
        command = [sys.executable, "-m", "ladezeit", *asked, "discard_first=false", f"outputs={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [json.loads(path.read_text()) for path in Path(folder).glob("sweeps/*/[0-9]*/result.json")]
    if not found:
        sys.exit(f"nothing was loaded by {' '.join(command)}:\n{done.stdout}{done.stderr}")
    methods: dict[str, Counter[str]] = {}
    for result in found:
        methods.setdefault(result["config"]["loading"]["name"], Counter())[result["status"]] += 1
    reasons = {
        f"{result['config']['loading']['name']}: {result['reason']}" for result in found if result["status"] != "ok"
    }
    return {
        "methods": {name: dict(statuses) for name, statuses in sorted(methods.items())},
        "reasons": sorted(reasons),
        "cpu": found[0]["environment"]["cpu"],
        "python": found[0]["environment"]["python"],
    }


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return what was counted of a model before, with what its methods that were loaded now have come to instead."""
    kept = {name: ended for name, ended in before.get("methods", {}).items() if name not in now["methods"]}
    reasons = [reason for reason in before.get("reasons", []) if reason.partition(":")[0] in kept]
    return {
        **now,
        "commands": (before.get("commands", []) if kept else []) + now["commands"],
        "methods": dict(sorted((kept | now["methods"]).items())),
        "reasons": sorted(reasons + now["reasons"]),
    }


def total(models: dict[str, Any]) -> Counter[str]:
    """Return how the samples of all models ended."""
    found = Counter[str]()
    for model in models.values():
        for ended in model["methods"].values():
            found.update(ended)
    return found


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    models = report["models"]
    names = sorted({name for model in models.values() for name in model["methods"]})
    ended = total(models)
    lines = [
        "# No false alarm",
        "",
        "Right loads, each in a process of its own, proven by `validation=full`: how they ended.",
        "",
        f"**{ended['wrong']} of {ended.total()} were called wrong**; {_cell(ended)}.",
        "",
        f"| method | {' | '.join(models)} |",
        f"|---{'|:-:' * len(models)}|",
        *(
            f"| `{name}` | {' | '.join(_cell(model['methods'].get(name)) for model in models.values())} |"
            for name in names
        ),
        "",
        *(
            f"- {name}: `{command}`, on {model['cpu']['model']}"
            for name, model in models.items()
            for command in model["commands"]
        ),
        *(f"- {name}: {reason}" for name, model in models.items() for reason in model["reasons"]),
        f"- {', '.join(f'{name} {found}' for name, found in report['packages'].items())}",
    ]
    return "\n".join(lines) + "\n"


def _cell(statuses: dict[str, int] | None) -> str:
    return ", ".join(f"{count} {status}" for status, count in statuses.items()) if statuses else "–"


if __name__ == "__main__":
    main()
