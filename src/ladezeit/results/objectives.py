"""What a method can be best at: the metrics a decision is made about, with their units and directions."""

from collections.abc import Iterable
from dataclasses import dataclass

from ladezeit.errors import LadezeitError, did_you_mean
from ladezeit.result import Result
from ladezeit.results.seconds import NOTHING, seconds

LOAD = "load/total_s"


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


def metric_named(asked: str, results: Iterable[Result]) -> str:
    """Return the metric that a person means by `asked`: an objective's short name, or a metric's own.

    Raises:
        LadezeitError: none of the samples has such a metric.
    """
    metric = _BY_NAME[asked].metric if asked in _BY_NAME else asked
    known = dict.fromkeys(name for result in results for name in result.metrics)
    if metric not in known and asked not in _BY_NAME:
        valid = [*_BY_NAME, *sorted(known)]
        raise LadezeitError(
            f"--metric {asked}: no sample has it. Short names are {', '.join(_BY_NAME)}; metrics are listed in "
            f"docs/result.md.{did_you_mean(asked, valid)}"
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


def figure(value: float | None, metric: str) -> str:
    """Return a value of `metric` as it is written everywhere, without its unit."""
    if value is None:
        return NOTHING
    unit = unit_of(metric)
    if unit == "s":
        return seconds(value)
    if unit == "" and float(value).is_integer():
        return f"{value:.0f}"
    return f"{value:.0f}" if unit == "B" or abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
