"""The part of a report that lets others check it: environment, commands, raw files, and what was left out."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ladezeit.result import FILE_NAME, Result
from ladezeit.results.comparison import PointFigures
from ladezeit.results.reading import KEPT, Samples
from ladezeit.results.repeating import point_command
from ladezeit.results.report.document import Report
from ladezeit.results.varying import as_text

_MOST_LINKS = 40
_MOST_LINES = 20
_MOST_VARIANTS = 3

#: Parts of a sample's environment that are its own, and no fact about the machine.
_OF_ONE_SAMPLE = ("cache_preparation", "prewarm", "gpu_memory_used_before_bytes", "gpu_drained")
#: Stands in the raw files and would bury the rest.
_DETAILS = ("tries", "reasons", "seconds")
_GIB = 2**30


def environment(results: Sequence[Result]) -> dict[str, str]:
    """Return what is known about machine and libraries, a line a group; several values where samples differ."""
    variants: dict[str, dict[str, None]] = {}
    known: dict[str, str] = {}  # by the group as JSON: nearly all samples have the same
    for result in results:
        for name, value in result.environment.items():
            if name not in _OF_ONE_SAMPLE:
                key = json.dumps(value, sort_keys=True, default=str)
                text = known.get(key) or known.setdefault(key, ", ".join(_words(value)))
                variants.setdefault(name, {})[text] = None
    facts = {name: " / ".join(list(texts)[:_MOST_VARIANTS]) for name, texts in variants.items()}
    for name, texts in variants.items():
        if len(texts) > _MOST_VARIANTS:
            facts[name] += f" / … ({len(texts)} in all)"
    times = sorted(result.started_at for result in results)
    facts["measured"] = times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"
    return {name: text for name, text in facts.items() if text}


def _words(value: Any, name: str = "") -> Iterator[str]:
    """Yield a value's parts as ``name value``; sizes in GiB, what is not known left out."""
    if isinstance(value, Mapping):
        for key, own in value.items():
            if key in _DETAILS:
                continue
            yield from _words(own, f"{name} {key}".strip())
    elif value is not None and value != "":
        if name.endswith("_bytes") and isinstance(value, int | float) and value >= _GIB / 10:
            name, value = name.removesuffix("_bytes"), f"{value / _GIB:.2f} GiB"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        yield f"{name} {as_text(value)}".strip()


def commands(report: Report) -> list[tuple[str, str]]:
    """Return the commands of the sweeps, then that which measures each point again, each with what it is."""
    found = [(f"sweep {record.id}", record.command) for record in report.samples.sweeps]
    for section in report.load.sections:
        for point in [*section.ranked, *section.apart]:
            again = point_command(point.samples[0], len(point.samples))
            found.append((f"{section.title}: {point.name}", again))
    return found


def raw_files(report: Report, folder: Path) -> list[tuple[str, list[str]]]:
    """Return each point with links, in Markdown and relative to `folder`, to the results that it rests on."""
    places = {id(result): place for result, place in zip(report.samples.results, report.samples.places, strict=True)}
    found = []
    for section in report.load.sections:
        for point in [*section.ranked, *section.apart]:
            found.append((f"{section.title}: {point.name}", _links(point, places, folder)))
    return found


def _links(point: PointFigures, places: Mapping[int, str], folder: Path) -> list[str]:
    samples = sorted(point.samples, key=lambda result: (result.identity.sample, result.started_at))
    links = [_link(f"#{result.identity.sample}", places[id(result)], folder) for result in samples[:_MOST_LINKS]]
    more = len(samples) - _MOST_LINKS
    return [*links, f"and {more} more beside them"] if more > 0 else links


def _link(label: str, place: str, folder: Path) -> str:
    path = Path(place.rpartition(":")[0] if f"{KEPT}:" in place else place)
    if not path.exists():
        return f"{label} ({place})"
    target = path / FILE_NAME if path.is_dir() else path
    return f"[{label}]({quote(os.path.relpath(target.resolve(), folder.resolve()))})"


def left_out(samples: Samples) -> list[str]:
    """Return a line for everything that is not among the samples: unreadable, set aside, never measured."""
    lines = [f"could not be read: {line}" for line in samples.unreadable[:_MOST_LINES]]
    if len(samples.unreadable) > _MOST_LINES:
        lines.append(f"… and {len(samples.unreadable) - _MOST_LINES} more that could not be read")
    for reason, places in samples.left_out_by_reason().items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        lines.append(f"{reason}: {places[0]}{more}")
    if samples.missing:
        lines.append(f"{samples.missing} planned samples have no result: the sweep is unfinished")
    return lines or ["Nothing: every sample that was found is counted above."]
