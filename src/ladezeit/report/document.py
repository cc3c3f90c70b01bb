"""What a report says, before it is written: verdict, comparisons, where figures come from."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ladezeit.analysis.comparison import Comparison, PointFigures, Section, compare_points
from ladezeit.analysis.decision import Decision, compare_objectives, decide_on
from ladezeit.analysis.eligibility import OBJECTIVES, machine_name
from ladezeit.report.fault_catches import Catch, fault_catches
from ladezeit.report.figures import METRIC as VALIDATION_COST
from ladezeit.results.fields import Condition, as_text, point_command
from ladezeit.results.reader import KEPT, Samples
from ladezeit.results.records import FILE_NAME, Result, Status

_MOST_LINKS = 40
_MOST_LINES = 20
_MOST_VARIANTS = 3

#: Parts of a sample's environment that are its own, and no fact about the machine.
_OF_ONE_SAMPLE = ("cache_preparation", "prewarm", "gpu_memory_used_before_bytes", "gpu_drained")
#: Stands in the raw files and would bury the rest.
_DETAILS = ("tries", "reasons", "seconds")
_GIB = 2**30


@dataclass(frozen=True)
class Report:
    """Everything that Markdown, HTML and pictures are made from; nothing is computed after this.

    `compared` holds one comparison an objective, in the order of `OBJECTIVES`, all with the same sections, to which
    `decisions` run parallel. `validation_costs` compares the time that the validation took.
    """

    title: str
    head: str
    samples: Samples
    compared: list[Comparison]
    decisions: list[Decision]
    notes: list[str]
    validation_costs: Comparison
    catches: dict[str, Catch]

    @property
    def heading(self) -> str:
        """What was compared, and the sweeps' title: ``Load times of 8 methods on tiny, warm cache (demo)``."""
        sections = self.load.sections
        methods = {point.name for section in sections for point in [*section.ranked, *section.unranked]}
        models = dict.fromkeys(section.conditions.get("model", "") for section in sections)
        caches = [name for section in sections if (name := section.conditions.get("cache"))]
        where = ", ".join([*filter(None, models), " and ".join(dict.fromkeys(caches)) + " cache" if caches else ""])
        many = "1 method" if len(methods) == 1 else f"{len(methods)} methods"
        return f"Load times of {many} on {where.removesuffix(', ')} ({self.title})"

    @property
    def load(self) -> Comparison:
        """The comparison of load times."""
        return self.compared[0]

    def get_section(self, objective: str, index: int) -> Section:
        """Return the section with that index, compared by the objective of that name."""
        names = [own.name for own in OBJECTIVES]
        return self.compared[names.index(objective)].sections[index]


def build_report(samples: Samples, *, current: Sequence[Condition] | None = None) -> Report:
    """Return the report on `samples`; `current` are conditions that the config in use meets.

    Raises:
        LadezeitError: as `ladezeit.analysis.decision.decide_methods`: nothing can be compared.
    """
    varying = samples.varying
    compared = compare_objectives(samples.results, varying)
    decisions, notes = decide_on(compared, samples.results, varying, current=current)
    titles = dict.fromkeys(record.title for record in samples.sweeps)
    return Report(
        title=" + ".join(titles) or "Load times",
        head=what_was_read(samples),
        samples=samples,
        compared=compared,
        decisions=decisions,
        notes=notes,
        validation_costs=compare_points(samples.results, varying, metric=VALIDATION_COST),
        catches=fault_catches(),
    )


# The part of a report that lets others check it: environment, commands, raw files, and what was left out.


def describe_environment(results: Sequence[Result]) -> dict[str, str]:
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


def list_commands(report: Report) -> list[tuple[str, str]]:
    """Return the commands of the sweeps, then that which measures each point again, each with what it is."""
    found = [(f"sweep {record.id}", record.command) for record in report.samples.sweeps]
    for section in report.load.sections:
        for point in [*section.ranked, *section.unranked]:
            again = point_command(point.samples[0], len(point.samples))
            found.append((f"{section.title}: {point.name}", again))
    return found


def raw_files(report: Report, folder: Path) -> list[tuple[str, list[str]]]:
    """Return each point with links, in Markdown and relative to `folder`, to the results that it rests on."""
    places = {id(result): place for result, place in zip(report.samples.results, report.samples.places, strict=True)}
    found = []
    for section in report.load.sections:
        for point in [*section.ranked, *section.unranked]:
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


# Where figures come from: which samples, of which sweeps, on which machine.


def what_was_read(samples: Samples) -> str:
    """Return what was read, in a sentence: how many samples of which sweeps, on which machine."""
    ok = sum(result.status is Status.ok for result in samples.results)
    sweeps = sorted({result.identity.sweep for result in samples.results if result.identity.sweep})
    of = f" of {len(sweeps)} sweeps" if len(sweeps) > 1 else f" of sweep {sweeps[0]}" if sweeps else ""
    machine = next((machine_name(result) for result in samples.results if result.environment), "an unknown machine")
    missing = f" {samples.missing} planned samples are missing." if samples.missing else ""
    return f"{len(samples.results)} samples{of}, {ok} ok, measured on {machine}.{missing}"
