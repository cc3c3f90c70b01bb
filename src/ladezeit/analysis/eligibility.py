"""Which samples count: a time is compared only where it was verified that the right thing was loaded."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ladezeit.errors import LadezeitError, did_you_mean
from ladezeit.results.fields import failure_reason, value_of
from ladezeit.results.format import NOTHING, format_seconds
from ladezeit.results.records import Result, Status

#: Levels that leave open whether every weight is where it should be: nothing is ranked on their word.
WEAKER_THAN_PLACEMENT = ("none", "sampled", "origin_rule", "all_modules")

#: The kind of process of a load that no sweep set up.
PRODUCTION = "production"

_LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "ladezeit")

LOAD = "load/total_s"


def level_of(result: Result) -> str:
    """Return the level of validation that was asked for, as the verification or else the config names it."""
    named = (result.proof or {}).get("level") or (result.config.get("validation") or {}).get("level")
    return str(named or "unknown")


def claim_of(samples: Sequence[Result]) -> str | None:
    """Return in one sentence what was verified of a quantized or split model; None where its level says it all."""
    claims = (str(proof["claim"]) for result in samples if (proof := result.proof) and proof.get("claim"))
    return next(claims, None)


def unverified_reason(result: Result) -> str | None:
    """Return in a line why an `ok` sample is not verified, None where it is (or where it is not `ok` anyway)."""
    if result.status is not Status.ok:
        return None
    if result.config.get("profile"):
        return "measured under a profiler, which itself takes time"
    return _unverified(result)


def _unverified(result: Result) -> str | None:
    proof = result.proof
    if not proof:
        return "no verification is on record"
    if not proof.get("ran"):
        return f"the verification did not run: {proof.get('reason', 'no reason given')}"
    if not proof.get("passed"):
        return f"the verification did not pass: {proof.get('reason', 'no reason given')}"
    if level_of(result) in WEAKER_THAN_PLACEMENT:
        return f"validation={level_of(result)} does not check where every weight is; validation=placement does"
    return None


def exclusion_reason(samples: Sequence[Result]) -> str | None:
    """Return in a line why the samples of a point are not ranked, None where they are.

    A method that loaded the wrong thing once is out, whatever its other samples say. One that failed now and then is
    ranked by what it measured; its status counts stand beside. Loads in production are shown and never ranked.
    """
    if any(value_of(result, "process") == PRODUCTION for result in samples):
        return "loaded in production, next to other work and with an uncontrolled page cache: not a measurement"
    wrong = [result for result in samples if result.status is Status.wrong]
    if wrong:
        return f"{len(wrong)} of {len(samples)} wrong: {failure_reason(wrong[0])}"
    doubts = Counter(text for result in samples if (text := unverified_reason(result)))
    if doubts:
        text, count = doubts.most_common(1)[0]
        return f"not verified ({count} of {len(samples)}): {text}"
    if not any(result.status is Status.ok for result in samples):
        first = Counter((result.status, failure_reason(result)) for result in samples).most_common(1)[0]
        (status, reason), count = first
        return f"{count} of {len(samples)} {status.value}: {reason}"
    return None


# What machine a sample ran on, and whether samples of several machines lie in one comparison.


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


# What a method can be best at: the metrics a decision is made about, with their units and directions.


@dataclass(frozen=True)
class Objective:
    """A metric with a short name for the command line, a title for people, and where it comes from if it is missing."""

    name: str
    metric: str
    title: str
    unit: str
    absent: str


OBJECTIVES = (
    Objective("load", LOAD, "load time", "s", "no sample has a load time"),
    Objective("first_token", "inference/first_token_s", "first token after the load", "s", "needs inference=greedy"),
    # What a load leaves undone (pages not read yet, kernels not chosen) the first token pays for.
    Objective("ready", "inference/load_and_first_token_s", "load and first token", "s", "needs inference=greedy"),
    Objective(
        "cold_start",
        "cold_start/first_token_s",
        "cold start to first token",
        "s",
        "needs process=fresh and inference=greedy",
    ),
    Objective("gpu_memory", "memory/gpu_allocated_peak_gib", "peak GPU memory", "GiB", "needs an NVIDIA GPU"),
    Objective("host_memory", "memory/host_peak_rss_gib", "peak host memory", "GiB", "no sample has it"),
)

_BY_NAME = {objective.name: objective for objective in OBJECTIVES}


def metric_named(requested: str, results: Iterable[Result]) -> str:
    """Return the metric that a person means by `requested`: an objective's short name, or a metric's own.

    Raises:
        LadezeitError: none of the samples has such a metric.
    """
    metric = _BY_NAME[requested].metric if requested in _BY_NAME else requested
    known = dict.fromkeys(name for result in results for name in result.metrics)
    if metric not in known and requested not in _BY_NAME:
        valid = [*_BY_NAME, *sorted(known)]
        raise LadezeitError(
            f"--metric {requested}: no sample has it. Short names are {', '.join(_BY_NAME)}; metrics are listed in "
            f"docs/result.md.{did_you_mean(requested, valid)}"
        )
    return metric


def more_is_better(metric: str) -> bool:
    """Say whether a larger value is the better one: rates and the share of a ceiling."""
    return metric.endswith(("_per_s", "ceiling_share"))


def unit_of(metric: str) -> str:
    """Return the unit that stands in the metric's name, an empty string where there is none."""
    for ending, unit in (("gb_per_s", "GB/s"), ("_per_s", "1/s"), ("_s", "s"), ("_gib", "GiB"), ("_bytes", "B")):
        if metric.endswith(ending):
            return unit
    return ""


def format_value(value: float | None, metric: str) -> str:
    """Return a value of `metric` as it is written everywhere, without its unit."""
    if value is None:
        return NOTHING
    unit = unit_of(metric)
    if unit == "s":
        return format_seconds(value)
    if unit == "" and float(value).is_integer():
        return f"{value:.0f}"
    return f"{value:.0f}" if unit == "B" or abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
