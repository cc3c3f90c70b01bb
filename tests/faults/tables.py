"""What the fault bench's outcomes come to: plain data for the package, and the tables of docs/verification.md."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import BY_LUCK, ENGINES, LEVELS, Outcome

from ladezeit.config import ValidationLevel
from ladezeit.validation.faults import WORDS, Fault
from ladezeit.validation.levels import CLAIMS

ROOT = Path(__file__).parents[2]
CATCHES = ROOT / "src" / "ladezeit" / "report" / "fault_catches.json"
PEERS = ROOT / "benchmarks" / "results" / "fault_peers.json"
COST = ROOT / "benchmarks" / "results" / "validation_cost.json"
#: Of benchmarks/proof.py, whose larger models no sweep of all levels is needed for.
PROOF = ROOT / "benchmarks" / "results" / "proof-cpu.json"
DOCUMENT = ROOT / "docs" / "verification.md"

#: From what looks least to what looks most.
COLUMNS = ("none", "origin_rule", "sampled", "all_modules", "placement", "logits", "content", "full")


def catches(outcomes: list[Outcome]) -> dict[str, Any]:
    """Return which faults each level finds with every engine that can have them.

    ``missed`` are those that it does not; where it finds one with some engines, ``partly`` has their names.
    """
    levels = {}
    for level in sorted(LEVELS, key=lambda level: COLUMNS.index(level.value)):
        found = {fault: _found_with(outcomes, level, fault) for fault in Fault}
        missed = [fault.value for fault, (with_, of) in found.items() if len(with_) < len(of)]
        levels[level.value] = {
            "found": len(found) - len(missed),
            "of": len(found),
            "missed": missed,
            "partly": {fault: found[Fault(fault)][0] for fault in missed if found[Fault(fault)][0]},
        }
    faults = [fault.value for fault in Fault]
    return {"faults": faults, "words": dict(WORDS), "engines": list(ENGINES), "levels": levels}


def _found_with(outcomes: list[Outcome], level: ValidationLevel, fault: Fault) -> tuple[list[str], list[str]]:
    asked = [one for one in outcomes if one.level is level and one.fault is fault]
    return [one.engine for one in asked if one.found], [one.engine for one in asked]


def costs() -> dict[str, dict[str, Any]]:
    """Return the median seconds of levels by model, with the model's ``gb``, from the benchmarks' result files."""
    found = {}
    for name, measured in json.loads(COST.read_text())["models"].items():
        seconds = {level: one["median_s"] for level, one in measured["levels"].items()}
        found[name] = {"gb": measured["gb"], **seconds}
    for name, measured in json.loads(PROOF.read_text())["models"].items():
        seconds = {level: measured[f"{level}_median_s"] for level in ("placement", "content")}
        found.setdefault(name, {"gb": measured["bytes"] / 1e9, **seconds})
    return found


def level_table(caught: Mapping[str, Any], cost: Mapping[str, Any]) -> str:
    """Return the table of faults and levels, with the cost of each level below."""
    head = ["planted fault", *(f"`{level}`" for level in COLUMNS)]
    rows = [[WORDS[fault], *(_cell(caught["levels"][level], level, fault) for level in COLUMNS)] for fault in Fault]
    total = [f"**{caught['levels'][level]['found']} of {caught['levels'][level]['of']}**" for level in COLUMNS]
    rows.append(["**found with every engine**", *total])
    for name, measured in cost.items():
        seconds = [_seconds(measured.get(level)) for level in COLUMNS]
        rows.append([f"cost on {name} ({measured['gb']:.2g} GB)", *seconds])
    return _table(head, rows)


def _cell(caught: Mapping[str, Any], level: str, fault: Fault) -> str:
    if (ValidationLevel(level), fault) in BY_LUCK:
        return "luck"
    if fault in CLAIMS[ValidationLevel(level)]:
        return "**yes**" if fault not in caught["missed"] else "**BROKEN**"
    if fault not in caught["missed"]:
        return "yes"
    return f"{len(caught['partly'][fault])} engines" if fault in caught["partly"] else "no"


def _seconds(median: float | None) -> str:
    if median is None:
        return "–"
    if median < 0.0001:
        return "nothing"
    return f"{median * 1000:.2g} ms" if median < 0.1 else f"{median:.2g} s"


def peer_table(caught: Mapping[str, Any], peers: Mapping[str, Any]) -> str:
    """Return the table of the faults that a library can meet by itself, and what each says of them."""
    missed = caught["levels"]["full"]["missed"]
    asked = [fault for fault in Fault if any(fault in noticed for noticed in peers["noticed"].values())]
    rows = [
        [
            WORDS[fault],
            *(noticed[fault]["noticed"] if fault in noticed else "–" for noticed in peers["noticed"].values()),
            "no" if fault in missed else "error",
        ]
        for fault in asked
    ]
    return _table(["planted fault", *peers["noticed"], "ladezeit `full`"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *(":-:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rendered(document: str, caught: Mapping[str, Any], peers: Mapping[str, Any], cost: Mapping[str, Any]) -> str:
    """Return `document` with the tables between its markers made anew."""
    for name, table in (("levels", level_table(caught, cost)), ("peers", peer_table(caught, peers))):
        begin, end = f"<!-- table: {name} -->", "<!-- end of table -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        assert len(pattern.findall(document)) == 1, f"{DOCUMENT} has not one place for the table of {name}"
        document = pattern.sub(lambda _, b=begin, t=table, e=end: f"{b}\n{t}\n{e}", document)
    return document
