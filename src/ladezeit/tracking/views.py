"""A comparison that opens ready-made in MLflow's interface: the state behind its "save view", written for each sweep.

The format is MLflow's own and undocumented (read off 3.17); whoever calls `save` must live with its failing.
"""

import base64
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from ladezeit.result import SweepRecord
from ladezeit.results.colours import COLOURS
from ladezeit.tracking import projection

TOTAL = "load/total_s"
_HEADLINES = (TOTAL, "inference/first_token_s", "cold_start/first_token_s", "validation/total_s")
_MEMORY = (
    "memory/weights_gib",
    "memory/gpu_allocated_peak_gib",
    "memory/gpu_reserved_peak_gib",
    "memory/host_peak_rss_gib",
)
_COLUMNS = (*_HEADLINES, "load/gb_per_s", "memory/gpu_allocated_peak_gib", "memory/host_peak_rss_gib")
_NO_PHASES = (TOTAL, "load/gb_per_s", "load/checkpoint_bytes", "load/file_bytes")
_MOST_PHASES = 12
_MOST_RUNS = 200


def share_key(sweep_id: str) -> str:
    """Return what names the sweep's view in an address."""
    return f"ladezeit-{projection.sweep_tag(sweep_id)}"


def tag_key(sweep_id: str) -> str:
    """Return the experiment's tag that holds the sweep's view."""
    return f"mlflow.sharedViewState.{share_key(sweep_id)}"


def save(client: Any, experiment_id: str, record: SweepRecord) -> None:
    """Write the sweep's view into its experiment and colour its runs by point; raises whatever MLflow raises."""
    of_sweep = f"tags.`{projection.SWEEP_TAG}` = '{projection.sweep_tag(record.id)}'"
    condition = f"{of_sweep} and tags.`{projection.ROLE_TAG}` = 'sample'"
    runs = client.search_runs([experiment_id], condition, max_results=_MOST_RUNS)
    largest: dict[str, float] = {}
    for name, value in (pair for run in runs for pair in run.data.metrics.items()):
        largest[name] = max(value, largest.get(name, value))
    metrics = sorted(largest, key=lambda name: -largest[name])
    now = int(time.time() * 1000)
    state = view_state(record, condition, metrics, _widest(runs, _point_keys(record)))
    text = json.dumps(state, separators=(",", ":"))
    packed = "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    view = {"name": record.title, "createdAt": now, "updatedAt": now, "state": packed}
    client.set_experiment_tag(experiment_id, tag_key(record.id), json.dumps(view))
    _colour(client, runs, _point_keys(record))


def view_state(
    record: SweepRecord, condition: str, metrics: Sequence[str], characters: Mapping[str, int]
) -> dict[str, Any]:
    """Return the state of MLflow's run page: table and charts of one sweep's samples, shortest load first.

    `metrics` are the names that the samples have, those with the largest values first; `characters`
    says how long the longest value of a param is.
    """
    keys = _point_keys(record)
    widths = {f"params.`{key}`": _width(max(len(key), characters.get(key, 0))) for key in keys}
    widths |= {"params.`sample`": _width(6), f"tags.`{projection.STATUS_TAG}`": _width(len(projection.STATUS_TAG))}
    widths |= {f"metrics.`{name}`": _width(len(name)) for name in _COLUMNS if name in metrics or not metrics}
    sections, charts = _charts(keys, metrics)
    return {
        "searchFilter": condition,
        "orderByKey": f"metrics.`{TOTAL}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(widths),
        "columnOrder": ["attributes.`Run Name`", *widths],
        "columnWidths": {"attributes.`Run Name`": _width(projection.MOST_NAME) + 50, **widths},
        "runsHidden": [],
        "runsPinned": [],
        "runsHiddenMode": "SHOWALL",
        "runsVisibilityMap": {},
        "runsExpanded": {},
        "viewMaximized": False,
        "runListHidden": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupsExpanded": {},
        "groupBy": None,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "isAccordionReordered": True,
        "compareRunSections": sections,
        "compareRunCharts": charts,
    }


def _width(characters: int) -> int:
    """Return how many pixels a column of so many characters takes in MLflow's table, within reason."""
    return min(320, 30 + 8 * characters)


def _widest(runs: Sequence[Any], keys: Sequence[str]) -> dict[str, int]:
    return {key: max((len(run.data.params.get(key, "")) for run in runs), default=0) for key in keys}


def _point_keys(record: SweepRecord) -> list[str]:
    return [key for key in record.varying if key != "sample"]


def _charts(keys: Sequence[str], metrics: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    phases = [name for name in metrics if name.startswith("load/") and name.endswith("_s") and name not in _NO_PHASES]
    relations = [_parallel(keys)] if keys else []
    relations.append(_scatter(TOTAL, "inference/first_token_s"))
    relations += [_scatter(TOTAL, memory) for memory in _MEMORY if memory in metrics][:1]
    contents = {
        "Load and first answer": [_bar(name) for name in _HEADLINES],
        "What varies, against the load": relations,
        "Phases of the load": [_bar(name) for name in phases[:_MOST_PHASES]],
        "Memory": [_bar(name) for name in _MEMORY],
    }
    sections, charts = [], []
    for name, members in contents.items():
        section = str(uuid5(NAMESPACE_URL, f"ladezeit/{name}"))
        flags = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
        sections.append({"uuid": section, "name": name, **flags, "columns": 3, "cardHeight": 400})
        charts += [{**chart, "metricSectionId": section} for chart in members]
    return sections, charts


def _chart(kind: str, about: str, **own: Any) -> dict[str, Any]:
    base = {"type": kind, "uuid": str(uuid5(NAMESPACE_URL, f"ladezeit/{kind}/{about}"))}
    return {**base, "runsCountToCompare": 100, "deleted": False, "isGenerated": False, **own}


def _bar(metric: str) -> dict[str, Any]:
    return _chart("BAR", metric, metricKey=metric, dataAccessKey=metric, displayName=metric)


def _scatter(x: str, y: str) -> dict[str, Any]:
    return _chart("SCATTER", f"{x}/{y}", xaxis={"key": x, "type": "METRIC"}, yaxis={"key": y, "type": "METRIC"})


def _parallel(keys: Sequence[str]) -> dict[str, Any]:
    return _chart("PARALLEL", "varying", selectedParams=list(keys), selectedMetrics=[TOTAL], showAllRuns=True)


def _colour(client: Any, runs: Sequence[Any], keys: Sequence[str]) -> None:
    """Give all samples of a point one colour."""
    points = {run.info.run_id: tuple(run.data.params.get(key, "") for key in keys) for run in runs}
    order = sorted(set(points.values()))
    for run_id, point in points.items():
        client.set_tag(run_id, "mlflow.runColor", COLOURS[order.index(point) % len(COLOURS)])
