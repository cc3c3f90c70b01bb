"""Comparisons that open ready-made in MLflow's interface: the state behind its "save view", written for each sweep.

Each sweep has two: `EVERY_SAMPLE`, a row and a bar a sample, and `AVERAGES`, one a point. The format is MLflow's own
and undocumented (read off 3.17); whoever calls `save` must live with its failing.
"""

import base64
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from ladezeit.result import SweepRecord
from ladezeit.results.colours import COLOURS
from ladezeit.tracking import projection
from ladezeit.tracking.charts import HEADLINES, TOTAL, sections_and_charts

#: The kinds of view of a sweep: what their keys end with.
EVERY_SAMPLE, AVERAGES = "", "-averages"

_COLUMNS = (*HEADLINES, "load/gb_per_s", "memory/gpu_allocated_peak_gib", "memory/host_peak_rss_gib")
_MOST_RUNS = 200
_NAME = "attributes.`Run Name`"
_WIDEST_NAME = 560


def share_key(sweep_id: str, kind: str = EVERY_SAMPLE) -> str:
    """Return what names a view of the sweep in an address."""
    return f"ladezeit-{projection.sweep_tag(sweep_id)}{kind}"


def tag_key(sweep_id: str, kind: str = EVERY_SAMPLE) -> str:
    """Return the experiment's tag that holds a view of the sweep."""
    return f"mlflow.sharedViewState.{share_key(sweep_id, kind)}"


def save(client: Any, experiment_id: str, record: SweepRecord) -> None:
    """Write the sweep's views into its experiment and colour its runs by point; raises whatever MLflow raises."""
    condition = sample_condition(record.id)
    runs = client.search_runs([experiment_id], condition, max_results=_MOST_RUNS)
    largest: dict[str, float] = {}
    for name, value in (pair for run in runs for pair in run.data.metrics.items()):
        largest[name] = max(value, largest.get(name, value))
    keys = point_keys(record)
    points = sorted({tuple(run.data.params.get(key, "") for key in keys) for run in runs})
    now = int(time.time() * 1000)
    for kind, title in ((EVERY_SAMPLE, record.title), (AVERAGES, f"{record.title}, averages over the samples")):
        state = view_state(keys, condition, largest, points, averages=kind is AVERAGES)
        text = json.dumps(state, separators=(",", ":"))
        packed = "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode()
        view = {"name": title, "createdAt": now, "updatedAt": now, "state": packed}
        client.set_experiment_tag(experiment_id, tag_key(record.id, kind), json.dumps(view))
    _colour(client, runs, keys)


def sample_condition(sweep_id: str) -> str:
    """Return MLflow's search for the sweep's samples, without its own run."""
    of_sweep = f"tags.`{projection.SWEEP_TAG}` = '{projection.sweep_tag(sweep_id)}'"
    return f"{of_sweep} and tags.`{projection.ROLE_TAG}` = 'sample'"


def point_keys(record: SweepRecord) -> list[str]:
    """Return the config keys that tell the sweep's points apart."""
    return [key for key in record.varying if key != "sample"]


def view_state(
    keys: Sequence[str],
    condition: str,
    largest: Mapping[str, float],
    points: Sequence[Sequence[str]],
    *,
    averages: bool = False,
) -> dict[str, Any]:
    """Return the state of MLflow's run page: table and charts of one sweep's samples, shortest load first.

    Args:
        keys: the config keys that tell the points apart.
        condition: the search for the samples.
        largest: the largest value of each metric that the samples have.
        points: the values of `keys` in each point.
        averages: one row and one bar a point instead of one a sample.
    """
    names = [_group_name(keys, point) for point in points] if averages else []
    longest = max(map(len, names), default=projection.MOST_NAME)
    first = {_NAME: min(_WIDEST_NAME, 100 + 8 * longest)}
    widths = {**({} if averages else _sample_columns(keys, points)), **_metric_columns(largest, averages=averages)}
    sections, charts = sections_and_charts(keys, largest, averages=averages)
    grouped = {
        "aggregateFunction": "average",
        "groupByKeys": [{"mode": "param", "groupByData": key} for key in keys],
    }
    return {
        "searchFilter": condition,
        "orderByKey": f"metrics.`{TOTAL}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(widths),
        "columnOrder": [*first, *widths],
        "columnWidths": {**first, **widths},
        "runsHidden": [],
        "runsPinned": [],
        "runsHiddenMode": "SHOWALL",
        "runsVisibilityMap": {},
        "runsExpanded": {},
        "viewMaximized": False,
        "runListHidden": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupsExpanded": {_group_id(keys, point): False for point in points} if averages else {},
        "groupBy": grouped if averages and keys else None,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "isAccordionReordered": True,
        "compareRunSections": sections,
        "compareRunCharts": charts,
    }


def _group_name(keys: Sequence[str], point: Sequence[str]) -> str:
    """Return the name that MLflow gives to the row of a point's average."""
    return "Group: " + ", ".join(f"{key}: {value}" for key, value in zip(keys, point, strict=True))


def _group_id(keys: Sequence[str], point: Sequence[str]) -> str:
    """Return the name by which MLflow remembers whether a group is folded."""
    return ",".join(f"param.{key}.{value}" for key, value in zip(keys, point, strict=True))


def _sample_columns(keys: Sequence[str], points: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return the columns that say which sample a row is and how it ended, with their widths in pixels."""
    longest = [max((len(point[index]) for point in points), default=0) for index in range(len(keys))]
    widths = {f"params.`{key}`": _width(max(len(key), most)) for key, most in zip(keys, longest, strict=True)}
    return widths | {"params.`sample`": _width(6), f"tags.`{projection.STATUS_TAG}`": _width(11)}


def _metric_columns(metrics: Mapping[str, float], *, averages: bool) -> dict[str, int]:
    """Return the columns of figures with their widths in pixels; MLflow writes averages with all digits."""
    least = 26 if averages else 0
    shown = [name for name in _COLUMNS if name in metrics or not metrics]
    return {f"metrics.`{name}`": _width(max(least, len(name))) for name in shown}


def _width(characters: int) -> int:
    """Return how many pixels a column of so many characters takes in MLflow's table, within reason."""
    return min(320, 30 + 8 * characters)


def _colour(client: Any, runs: Sequence[Any], keys: Sequence[str]) -> None:
    """Give all samples of a point one colour."""
    points = {run.info.run_id: tuple(run.data.params.get(key, "") for key in keys) for run in runs}
    order = sorted(set(points.values()))
    for run_id, point in points.items():
        client.set_tag(run_id, "mlflow.runColor", COLOURS[order.index(point) % len(COLOURS)])
