"""Samples grouped by point, with the medians a table shows."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ladezeit.result import Result, Status
from ladezeit.results.statistics import Spread
from ladezeit.results.varying import value_of, varying_values


def coverage(n: int) -> float:
    """Return the probability with which the range of `n` independent values covers their true median."""
    return 1 - 2.0 ** (1 - n)


@dataclass(frozen=True)
class PointSummary:
    """The samples of one point; figures come from its `ok` samples alone and are None where none has them."""

    point: str
    model: str
    cache: str
    values: dict[str, str]
    counts: dict[Status, int]
    problems: dict[tuple[Status, str], int]
    load_s: Spread | None
    ceiling_share: float | None
    cold_start_s: float | None
    first_token_s: float | None
    gpu_memory_gib: float | None
    host_memory_gib: float | None
    validation_s: float | None

    @property
    def n(self) -> int:
        """How many samples are `ok`."""
        return self.counts.get(Status.ok, 0)


def summarise(results: Sequence[Result], varying: Sequence[str]) -> list[PointSummary]:
    """Group `results` by point, sorted by model, cache state and load median; points without a median come last."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.identity.point, []).append(result)
    summaries = [_summary(group, varying) for group in groups.values()]
    return sorted(
        summaries,
        key=lambda s: (s.model, s.cache, s.load_s is None, s.load_s.median if s.load_s else 0.0, str(s.values)),
    )


def _summary(group: list[Result], varying: Sequence[str]) -> PointSummary:
    first = group[0]
    return PointSummary(
        point=first.identity.point,
        model=value_of(first, "model"),
        cache=value_of(first, "cache"),
        values=varying_values(first, varying),
        counts=dict(Counter(result.status for result in group)),
        problems=dict(Counter((r.status, why(r)) for r in group if r.status is not Status.ok)),
        load_s=Spread.of(metric_of(group, "load/total_s")),
        ceiling_share=_median(group, "load/ceiling_share"),
        cold_start_s=_median(group, "cold_start/first_token_s"),
        first_token_s=_median(group, "inference/first_token_s"),
        gpu_memory_gib=_median(group, "memory/gpu_allocated_peak_gib"),
        host_memory_gib=_median(group, "memory/host_peak_rss_gib"),
        validation_s=_median(group, "validation/total_s"),
    )


def metric_of(results: Iterable[Result], name: str) -> list[float]:
    """Return the metric `name` of those results that are `ok` and have it."""
    return [r.metrics[name] for r in results if r.status is Status.ok and name in r.metrics]


def why(result: Result) -> str:
    """Return in one line why a sample is not `ok`."""
    text = result.reason or (f"{result.error.type}: {result.error.message}" if result.error else "no reason given")
    return " ".join(text.split())


def _median(group: Sequence[Result], name: str) -> float | None:
    spread = Spread.of(metric_of(group, name))
    return spread.median if spread else None
