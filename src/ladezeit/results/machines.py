"""What machine a sample ran on, and whether samples of several machines lie in one comparison."""

from collections.abc import Sequence
from typing import Any

from ladezeit.errors import LadezeitError
from ladezeit.result import Result
from ladezeit.results.varying import value_of

_LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "ladezeit")


def machine_of(result: Result) -> dict[str, str]:
    """Return what makes a machine another one for a load; empty where the sample knows of none (it never started)."""
    known = result.environment
    facts = {
        "cpu": _at(known, "cpu", "model"),
        "cores": _at(known, "cpu", "available"),
        "memory": _gib(_at(known, "memory", "limit_bytes") or _at(known, "memory", "total_bytes")),
        "gpu": _at(known, "device", "gpu", "name"),
        "storage": _at(known, "storage", "source"),
        "filesystem": _at(known, "storage", "filesystem"),
    }
    return {name: str(value) for name, value in facts.items() if value}


def machine_name(result: Result) -> str:
    """Return the machine in a few words: its GPU if it has one, else its processor, cores and memory."""
    facts = machine_of(result)
    cpu = f"{facts.get('cpu', 'unknown CPU')}, {facts.get('cores', '?')} cores, {facts.get('memory', '? GiB')}"
    return f"{facts['gpu']} · {cpu}" if "gpu" in facts else cpu


def check_one_machine(results: Sequence[Result]) -> None:
    """Raise `LadezeitError`, which says what differs, where samples of one model ran on different machines."""
    seen: dict[tuple[str, str], dict[str, None]] = {}
    for result in results:
        model = value_of(result, "model")
        for name, value in machine_of(result).items():
            seen.setdefault((model, name), {})[value] = None
    differing = {name: " / ".join(values) for (_, name), values in seen.items() if len(values) > 1}
    if differing:
        raise LadezeitError(
            f"these samples were measured on different machines "
            f"({'; '.join(f'{name}: {values}' for name, values in differing.items())}), so their times say nothing "
            f"about the methods: give one machine's results, or --across-machines to see them side by side"
        )


def library_notes(results: Sequence[Result]) -> list[str]:
    """Return one line for each library of which the samples used several versions."""
    seen: dict[str, dict[str, None]] = {}
    for result in results:
        for name in _LIBRARIES:
            if version := _at(result.environment, "libraries", name):
                seen.setdefault(name, {})[str(version)] = None
    return [
        f"samples of different versions of {name} are compared: {', '.join(versions)}"
        for name, versions in seen.items()
        if len(versions) > 1
    ]


def _at(node: Any, *path: str) -> Any:
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _gib(size: Any) -> str | None:
    return f"{size / 2**30:.0f} GiB" if isinstance(size, int | float) else None
