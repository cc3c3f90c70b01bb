"""The charts of a sweep's saved view, in the words of MLflow's interface (undocumented, read off 3.17)."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import NAMESPACE_URL, uuid5

TOTAL = "load/total_s"
HEADLINES = (TOTAL, "inference/first_token_s", "cold_start/first_token_s", "validation/total_s")
MEMORY = (
    "memory/weights_gib",
    "memory/gpu_allocated_peak_gib",
    "memory/gpu_reserved_peak_gib",
    "memory/host_peak_rss_gib",
)
#: What time is set against: the peak on the device that holds the model.
_MEMORY_PEAKS = ("memory/gpu_allocated_peak_gib", "memory/host_peak_rss_gib")
_NO_PHASES = (TOTAL, "load/gb_per_s", "load/checkpoint_bytes", "load/file_bytes")
_MOST_PHASES = 12
_NOT_OF_GROUPS = ("PARALLEL", "DIFFERENCE")

_Chart = dict[str, Any]


def sections_and_charts(
    keys: Sequence[str], largest: Mapping[str, float], *, averages: bool
) -> tuple[list[_Chart], list[_Chart]]:
    """Return the sections of the page and the charts in them, the answer to "which method?" first.

    Args:
        keys: the config keys that vary between points.
        largest: the largest value of each metric over the sweep's samples; charts of a metric that is 0 throughout
            are left out. Empty where no sample is known yet: then every chart is there.
        averages: leave out the charts that MLflow draws empty for groups of runs.
    """
    seen = {name for name, value in largest.items() if value > 0}
    sections, charts = [], []
    for (name, columns), members in _contents(keys, largest, seen).items():
        shown = [chart for chart in members if not (averages and chart["type"] in _NOT_OF_GROUPS)]
        if not shown:
            continue
        section = str(uuid5(NAMESPACE_URL, f"ladezeit/{name}"))
        flags = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
        sections.append({"uuid": section, "name": name, **flags, "columns": columns, "cardHeight": 400})
        charts += [{**chart, "metricSectionId": section} for chart in shown]
    return sections, charts


def _contents(keys: Sequence[str], largest: Mapping[str, float], seen: set[str]) -> dict[tuple[str, int], list[_Chart]]:
    """Return the charts by the title of their section and how many stand side by side in it."""

    def bars(names: Sequence[str]) -> list[_Chart]:
        return [_bar(name) for name in names if name in seen or not largest]

    by_value = sorted(seen, key=lambda name: -largest[name])
    phases = [name for name in by_value if name.startswith("load/") and name.endswith("_s") and name not in _NO_PHASES]
    peak = next((memory for memory in _MEMORY_PEAKS if memory in seen), _MEMORY_PEAKS[-1])
    relations = [_parallel(keys)] if keys else []
    relations += [_scatter(TOTAL, peak), _scatter(TOTAL, "inference/first_token_s")]
    return {
        ("Load and first answer", 2): bars(HEADLINES),
        ("What varies, against the load", 2): relations,
        ("What differs between runs", 1): [_difference()],
        ("Phases of the load", 3): bars(phases[:_MOST_PHASES]),
        ("Memory", 3): bars(MEMORY),
    }


def _chart(kind: str, about: str, **own: Any) -> _Chart:
    base = {"type": kind, "uuid": str(uuid5(NAMESPACE_URL, f"ladezeit/{kind}/{about}"))}
    return {**base, "runsCountToCompare": 100, "deleted": False, "isGenerated": False, **own}


def _bar(metric: str) -> _Chart:
    return _chart("BAR", metric, metricKey=metric, dataAccessKey=metric, displayName=metric)


def _scatter(x: str, y: str) -> _Chart:
    return _chart("SCATTER", f"{x}/{y}", xaxis={"key": x, "type": "METRIC"}, yaxis={"key": y, "type": "METRIC"})


def _parallel(keys: Sequence[str]) -> _Chart:
    return _chart("PARALLEL", "varying", selectedParams=list(keys), selectedMetrics=[TOTAL], showAllRuns=True)


def _difference() -> _Chart:
    return _chart(
        "DIFFERENCE",
        "all",
        chartName="Runs side by side",
        compareGroups=["Model metrics", "Parameters"],
        showChangeFromBaseline=True,
        showDifferencesOnly=True,
        baselineColumnUuid="",
    )
