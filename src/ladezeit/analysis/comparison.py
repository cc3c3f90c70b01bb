"""Points compared by one metric: grouped over their samples, ranked where verified, apart where not."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ladezeit.analysis.eligibility import (
    LOAD,
    check_one_machine,
    exclusion_reason,
    level_of,
    library_notes,
    machine_name,
    more_is_better,
)
from ladezeit.analysis.statistics import LEAST_TO_RANK, Ratio, Spread, compare_against, compute_ranks, estimate_ratio
from ladezeit.errors import LadezeitError
from ladezeit.results.fields import (
    Condition,
    as_text,
    failure_reason,
    fingerprint_of,
    matches_conditions,
    metric_of,
    property_of,
    value_of,
)
from ladezeit.results.records import Result, Status

#: What a person does not choose when choosing a method: points are compared where these are equal.
CONDITIONS = ("model", "cache", "process", "device")

#: What everything is compared with unless the caller says otherwise.
BASELINE: tuple[Condition, ...] = (("loading", "transformers"),)

_MACHINE = "machine"

#: Samples by the values of their conditions, inside of that by point and machine.
_Groups = dict[tuple[str, ...], dict[tuple[str, str], list[Result]]]

#: Characters of a config value that may stand in a name.
_MOST_TELLING = 60

#: Values that say nothing without their key.
_MUTE = ("true", "false", "null")


@dataclass(frozen=True)
class PointFigures:
    """One point: what its samples say about the metric, and how it stands to the baseline and to the others.

    `p` is that of the exact Mann-Whitney test against the baseline, adjusted by Holm over the section; `rank` is None
    below five samples; `excluded` says why the point is not ranked at all. `values` are its varying config values,
    `name` those of them that say something in its section.
    """

    point: str
    name: str
    values: dict[str, str]
    level: str
    counts: dict[str, int]
    spread: Spread | None
    ratio: Ratio | None
    p: float | None
    rank: int | None
    ceiling_share: float | None
    excluded: str | None
    problems: list[str]
    samples: tuple[Result, ...] = field(repr=False, compare=False)

    def metric_values(self, metric: str) -> list[float]:
        """Return the values of `metric` over the point's `ok` samples, in the order of their blocks."""
        return metric_of(sorted(self.samples, key=lambda result: result.identity.sample), metric)


def title_of(conditions: Mapping[str, str]) -> str:
    """Return conditions in words: ``tiny · cold cache · fresh process · device cpu``."""
    words = {"model": "{}", "cache": "{} cache", "process": "{} process"}
    return " · ".join(words.get(key, key + " {}").format(value) for key, value in conditions.items() if value)


@dataclass(frozen=True)
class Section:
    """Points that may be compared: equal in `conditions`. The best come first; `unranked` ones have a reason.

    `baseline` is the point that ratios and p refer to, None where no point has a value.
    """

    conditions: dict[str, str]
    ranked: list[PointFigures]
    unranked: list[PointFigures]
    baseline: PointFigures | None

    @property
    def title(self) -> str:
        """The conditions in words."""
        return title_of(self.conditions)


@dataclass(frozen=True)
class Comparison:
    """All sections, and what a reader has to know besides."""

    metric: str
    keys: list[str]
    sections: list[Section]
    notes: list[str]


def compare_points(
    results: Sequence[Result],
    varying: Sequence[str],
    *,
    metric: str = LOAD,
    baseline: Sequence[Condition] | None = None,
    by: Sequence[str] = CONDITIONS,
    across_machines: bool = False,
) -> Comparison:
    """Compare all points of `results` by `metric`.

    Args:
        results: samples, in any order.
        varying: the config keys that tell the points apart.
        metric: the name of a metric, as in the result file.
        baseline: which point ratios refer to, as conditions that one point of a section meets; None takes
            ``loading=transformers``, or the best point where a section has none such.
        by: config keys in which points must be equal to be compared; the checkpoint always is one.
        across_machines: take the machine as one more of these keys' companions, instead of refusing.

    Raises:
        LadezeitError: the samples ran on different machines; several points of a section meet `baseline`, or none of
            any section does.
    """
    if not across_machines:
        check_one_machine(results)
    by = by if "model" in by else ["model", *by]  # methods are compared on one checkpoint, always
    keys = [key for key in varying if key not in by and key != "sample" and not key.startswith("model.")]
    keys += [_MACHINE] if across_machines else []
    groups = _grouped(results, by, across_machines=across_machines)
    keys += _distinguishing(groups, keys)
    sections = [
        _section(dict(zip(by, where, strict=True)), points, keys, metric, baseline)
        for where, points in sorted(groups.items())
    ]
    if baseline is not None and all(section.baseline is None for section in sections):
        wanted = " ".join(f"{key}={value}" for key, value in baseline)
        raise LadezeitError(
            f"no verified configuration with a {metric} matches the baseline {wanted}: see the table's values"
        )
    return Comparison(metric, keys, sections, library_notes(results))


def _grouped(results: Sequence[Result], by: Sequence[str], *, across_machines: bool) -> _Groups:
    """Return the samples by the values of `by`, and inside of that by point and machine (empty where it is no key)."""
    groups: _Groups = {}
    names = name_checkpoints(results)
    for result in results:
        machine = machine_name(result) if across_machines and result.environment else ""
        model = names[_checkpoint(result)]
        where = tuple(model if key == "model" else value_of(result, key) for key in by)
        groups.setdefault(where, {}).setdefault((result.identity.point, machine), []).append(result)
    return groups


#: A checkpoint by its model's config as JSON, and its fingerprint where that is on record.
_Checkpoint = tuple[str, str | None]


def _checkpoint(result: Result) -> _Checkpoint:
    return json.dumps(result.config.get("model"), sort_keys=True, default=str), fingerprint_of(result)


def name_checkpoints(results: Sequence[Result]) -> dict[_Checkpoint, str]:
    """Return what each checkpoint of the samples is called: its model's name, with what tells it from another of that
    name.

    Other weights are other work, whatever key chose them: two checkpoints never have one name. A sample that never
    started has no fingerprint, and goes with those of its config.
    """
    found = {_checkpoint(result): value_of(result, "model") for result in results}
    prints: dict[str, list[str]] = {}
    for config, fingerprint in found:
        if fingerprint is not None:
            prints.setdefault(config, []).append(fingerprint)
    identity = {key: key[1] or prints.get(key[0], [key[0]])[0] for key in found}
    same_name: dict[str, dict[str, str]] = {}
    for key, name in found.items():
        same_name.setdefault(name, {}).setdefault(identity[key], key[0])
    told = {}
    for key, name in found.items():
        rivals = same_name[name]
        told[key] = name if len(rivals) == 1 else f"{name} ({_difference(identity[key], rivals)})"
    return told


def _difference(identity: str, rivals: Mapping[str, str]) -> str:
    """Return what the model's config says of this checkpoint and of no rival, or else its fingerprint, shortened."""
    own = json.loads(rivals[identity]) or {}
    others = [json.loads(config) or {} for known, config in rivals.items() if known != identity]
    telling = [
        f"{key}={as_text(value)}" for key, value in own.items() if all(other.get(key) != value for other in others)
    ]
    return ", ".join(text for text in telling if len(text) <= _MOST_TELLING) or identity[:12]


def _distinguishing(groups: _Groups, keys: Sequence[str]) -> list[str]:
    """Return the key that tells points apart whose values are all the same: the sweep, or else the point's own id.

    A point of an older ladezeit has another id, even if the options that it lacked have no effect.
    """
    extras: tuple[list[str], ...] = ([], ["sweep"], ["point"])
    for extra in extras:
        seen = [
            (where, machine, *(property_of(samples[0], key) for key in (*keys, *extra) if key != _MACHINE))
            for where, points in groups.items()
            for (_, machine), samples in points.items()
        ]
        if len(seen) == len(set(seen)):
            return extra
    return ["point"]


def _section(
    conditions: dict[str, str],
    points: Mapping[tuple[str, str], list[Result]],
    keys: Sequence[str],
    metric: str,
    wanted: Sequence[Condition] | None,
) -> Section:
    plain = _named([_plain_figures(samples, machine, keys, metric) for (_, machine), samples in points.items()])
    ranked = [point for point in plain if point.spread and not point.excluded]
    apart = [point for point in plain if not point.spread or point.excluded]
    more = more_is_better(metric)
    ranked.sort(key=lambda point: (-1 if more else 1) * (point.spread.median if point.spread else 0.0))
    base = _baseline(ranked, conditions, wanted)
    values = {str(index): point.metric_values(metric) for index, point in enumerate(ranked)}
    level = compute_ranks(values, more_is_better=more)
    at = str(ranked.index(base)) if base else ""
    chances = compare_against(values, at) if base else {}
    finished = [
        _finished(point, values[str(index)], values.get(at, []), chances.get(str(index)), level.get(str(index)))
        for index, point in enumerate(ranked)
    ]
    finished.sort(key=lambda point: (point.rank is None, point.rank or 0))
    reference = next((point for point in finished if base and point.samples is base.samples), None)
    return Section(conditions, finished, apart, reference)


def _plain_figures(samples: list[Result], machine: str, keys: Sequence[str], metric: str) -> PointFigures:
    first = samples[0]
    values = {key: machine if key == _MACHINE else property_of(first, key) for key in keys}
    excluded = exclusion_reason(samples)
    spread = Spread.from_values(metric_of(samples, metric))
    shares = metric_of(samples, "load/ceiling_share")
    counts = Counter(result.status for result in samples)
    problems = Counter((r.status, failure_reason(r)) for r in samples if r.status is not Status.ok)
    return PointFigures(
        point=first.identity.point,
        name="",
        values=values,
        level=level_of(first),
        counts={status.value: counts[status] for status in Status if status in counts},
        spread=spread,
        ratio=None,
        p=None,
        rank=None,
        ceiling_share=statistics.median(shares) if shares else None,
        excluded=excluded or (None if spread else f"no sample has {metric}"),
        problems=[f"{count} {status.value}: {reason}" for (status, reason), count in problems.items()],
        samples=tuple(samples),
    )


def _named(points: Sequence[PointFigures]) -> list[PointFigures]:
    """Return the points with names: without the values that all points which can be ranked have in common."""
    ranked = [point for point in points if point.spread and not point.excluded]
    told = ranked if len(ranked) > 1 else points
    common = {key: value for key, value in told[0].values.items() if all(p.values[key] == value for p in told)}
    named = []
    for point in points:
        telling = {key: value for key, value in point.values.items() if value and common.get(key) != value}
        words = [format_setting(key, value) for key, value in (telling or point.values).items() if value]
        named.append(replace(point, name=" · ".join(words) or "all samples"))
    return named


def format_setting(key: str, value: str) -> str:
    """Return a value that speaks for itself (``streamed``), or its key with it (``loading.threads=8``)."""
    return value if value.isidentifier() and value not in _MUTE else f"{key}={value}"


def _baseline(
    ranked: Sequence[PointFigures], conditions: Mapping[str, str], wanted: Sequence[Condition] | None
) -> PointFigures | None:
    found = [point for point in ranked if matches_conditions(point.samples[0], wanted or BASELINE)]
    if wanted is not None and len(found) > 1:
        where = ", ".join(point.name for point in found)
        asked = " ".join(f"{key}={value}" for key, value in wanted)
        title = " · ".join(value for value in conditions.values() if value)
        raise LadezeitError(
            f"{len(found)} configurations match {asked} ({title}: {where}): add a key that tells them apart"
        )
    if len(found) == 1:
        return found[0]
    return ranked[0] if ranked and wanted is None else None


def _finished(
    point: PointFigures, own: list[float], base: list[float], p: float | None, rank: int | None
) -> PointFigures:
    """Return the point with what follows from its standing to the baseline; `p` is None for the baseline itself."""
    enough = min(len(own), len(base)) >= LEAST_TO_RANK
    return replace(
        point, p=p if enough else None, rank=rank, ratio=estimate_ratio(own, base) if p is not None and base else None
    )
