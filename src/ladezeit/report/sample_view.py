"""One sample as a tree: how it ended first, then where its time went, effective settings, verification."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text
from rich.tree import Tree

from ladezeit.analysis.eligibility import format_value, machine_name, unit_of, unverified_reason
from ladezeit.report.comparison_table import format_percent
from ladezeit.results.fields import as_text, failure_reason, value_of
from ladezeit.results.format import format_seconds
from ladezeit.results.records import Phase, Result, Status

_COLORS = {Status.ok: "green", Status.skipped: "yellow", Status.invalid: "yellow"}
_LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "ladezeit")
_NOT_SHOWN = ("inference", "memory_sources", "profile", "functions")
_MOST_FUNCTIONS = 5


def as_rich(result: Result, place: str) -> RenderableType:
    """Return the whole view; `place` is the sample's folder, or the run it was read from."""
    return Group(
        _head(result),
        _phases(result),
        *_profile(result),
        _facts("metrics", {name: _metric(name, value) for name, value in result.metrics.items() if _told(name)}),
        _facts("effective", {k: as_text(v) for k, v in _flat(result.effective) if v not in (None, [], {})}),
        _proof(result),
        _facts("environment", _environment(result)),
        _facts("evidence", _evidence(place)),
        Text.assemble("repeat it: ", (result.identity.command, "bold")),
    )


def _head(result: Result) -> RenderableType:
    color = _COLORS.get(result.status, "red")
    lines = [Text.assemble((result.status.value, f"bold {color}"), " ", (result.identity.label, "bold"))]
    if result.status is not Status.ok:
        lines.append(Text(failure_reason(result), style=color))
    elif text := unverified_reason(result):
        lines.append(Text(f"not ranked: {text}", style="yellow"))
    what = [f"{key} {value}" for key in ("model", "loading", "cache", "process") if (value := value_of(result, key))]
    lines.append(Text(" · ".join(what)))
    total = result.metrics.get("load/total_s")
    if total is not None:
        share = result.metrics.get("load/ceiling_share")
        reached = f", {format_percent(share)} of the {result.effective.get('ceiling', '')} ceiling" if share else ""
        lines.append(Text(f"load {format_seconds(total)} s{reached}"))
    if result.error is not None and result.error.trace:
        lines.append(Text(result.error.trace.strip().splitlines()[-1], style="dim"))
    return Group(*lines)


def _phases(result: Result) -> RenderableType:
    if not result.phases:
        return Text("phases: none were recorded")
    by_path: dict[str, list[Phase]] = {}
    for phase in sorted(result.phases, key=lambda phase: (phase.start_s, -phase.duration_s)):
        by_path.setdefault(phase.path, []).append(phase)
    top = [path for path in by_path if not _parent(path, by_path)]
    whole_s = sum(phase.duration_s for path in top for phase in by_path[path])
    tree = Tree(Text(f"phases: {format_seconds(whole_s)} s in all, shares of the phase above"), guide_style="dim")
    branches: dict[str, Tree] = {}
    durations = {path: sum(phase.duration_s for phase in same) for path, same in by_path.items()}
    for path in sorted(by_path, key=lambda path: (path.count("/"), by_path[path][0].start_s)):
        parent = _parent(path, by_path)
        of_s = durations[parent] if parent else whole_s
        name = path.removeprefix(f"{parent}/") if parent else path
        line = _line(name, durations[path], of_s, len(by_path[path]))
        own_s = sum(phase.self_s for phase in by_path[path])
        if own_s < 0.99 * durations[path] and not any(_parent(other, by_path) == path for other in by_path):
            line.append(f" own {format_seconds(own_s)} s", "dim")  # what ran inside it stands beside it
        branches[path] = branches.get(parent, tree).add(line)
    for path, branch in branches.items():
        own_s = sum(phase.self_s for phase in by_path[path])
        if branch.children:
            branch.add(_line("(unattributed)", own_s, durations[path], 1))
    return tree


def _parent(path: str, known: Mapping[str, Any]) -> str:
    """Return the nearest phase around `path`, an empty string where it stands alone."""
    parts = path.split("/")
    return next(("/".join(parts[:n]) for n in range(len(parts) - 1, 0, -1) if "/".join(parts[:n]) in known), "")


def _line(name: str, spent_s: float, of_s: float, times: int) -> Text:
    share = spent_s / of_s if of_s > 0 else 0.0
    bar = "█" * round(20 * share)
    count = f" ×{times}" if times > 1 else ""
    return Text.assemble(f"{name + count:<24}", f"{format_seconds(spent_s):>8} s {100 * share:>5.1f} % ", (bar, "blue"))


def _profile(result: Result) -> list[RenderableType]:
    """Return the functions that took most of the time themselves, where a profiler looked."""
    parts = (result.effective.get("profile") or {}).get("functions") or {}
    trees = []
    for part, functions in parts.items():
        tree = Tree(Text(f"profile of the {part}: functions by their own time"), guide_style="dim")
        for found in functions[:_MOST_FUNCTIONS]:
            tree.add(Text(f"{format_seconds(found['own_s']):>8} s  {found['function']}  {found['place']}"))
        trees.append(tree)
    return [*trees]


def _told(name: str) -> bool:
    """Say whether a metric is shown: those of phases stand in the tree already."""
    return not (name.startswith("load/") and name.endswith("_s") and name not in ("load/total_s", "load/gb_per_s"))


def _metric(name: str, value: float) -> str:
    return f"{format_value(value, name)} {unit_of(name)}".strip()


def _flat(node: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in node.items():
        if key in _NOT_SHOWN:
            continue
        found += [(f"{key}.{k}", v) for k, v in value.items()] if isinstance(value, Mapping) else [(key, value)]
    return found


def _proof(result: Result) -> RenderableType:
    proof = result.proof
    if proof is None:
        return Text("verification: none; the validation was not reached", style="yellow")
    passed = "passed" if proof.get("passed") else "did not run" if not proof.get("ran") else "did not pass"
    tree = Tree(
        Text(f"verification: {proof.get('level')} {passed}, {format_seconds(proof.get('total_s'))} s"),
        guide_style="dim",
    )
    tree.add(Text(str(proof.get("reason", ""))))
    for finding in proof.get("findings", [])[:10]:
        tree.add(Text(f"{finding.get('kind')} {finding.get('name')}: {finding.get('detail')}", style="red"))
    return tree


def _environment(result: Result) -> dict[str, str]:
    known = result.environment
    libraries = known.get("libraries") or {}
    storage = known.get("storage") or {}
    facts = {
        "machine": machine_name(result) if known else "",
        "storage": " ".join(str(storage[key]) for key in ("filesystem", "source") if storage.get(key)),
        "libraries": ", ".join(f"{name} {libraries[name]}" for name in _LIBRARIES if name in libraries),
        "python": str(known.get("python", "")),
        "measured": result.started_at,
    }
    return {name: text for name, text in facts.items() if text}


def _evidence(place: str) -> dict[str, str]:
    folder = Path(place)
    if not folder.is_dir():
        return {"read from": place}
    return {entry.name: str(entry) for entry in sorted(folder.iterdir()) if entry.is_file() and entry.name[0] != "."}


def _facts(title: str, facts: Mapping[str, str]) -> RenderableType:
    tree = Tree(Text(title), guide_style="dim")
    for name, text in facts.items():
        tree.add(f"{escape(name)}: {escape(text)}", highlight=False)
    return tree
