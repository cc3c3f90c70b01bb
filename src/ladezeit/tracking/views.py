"""Comparisons that open ready-made in MLflow's interface: the state behind its "save view", written for each sweep.

Each sweep has two: `EVERY_SAMPLE`, a row and a bar a sample, and `AVERAGES`, one a point. The format is MLflow's own
and undocumented (read off 3.17), so none is written for an MLflow that is not known to read it; whoever calls
`save_views` must live with its failing.
"""

import base64
import json
import os
import re
import shlex
import shutil
import sys
import time
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_URL, uuid5

from ladezeit.errors import TrackingError
from ladezeit.redaction import redact_text, without_credentials
from ladezeit.report.colors import COLORS
from ladezeit.results.records import SweepRecord
from ladezeit.tracking import projection
from ladezeit.tracking.store import DATABASE_FILE, Store

#: The releases of MLflow whose interface reads these views: from the first, and before the second.
KNOWN_FORMAT = (3, 10), (3, 18)

#: The kinds of view of a sweep: what their keys end with.
EVERY_SAMPLE, AVERAGES = "", "-averages"

TOTAL = "load/total_s"
HEADLINES = (TOTAL, "inference/first_token_s", "cold_start/first_token_s", "validation/total_s")

_COLUMNS = (*HEADLINES, "load/gb_per_s", "memory/gpu_allocated_peak_gib", "memory/host_peak_rss_gib")
_MOST_RUNS = 200
_NAME = "attributes.`Run Name`"
_WIDEST_NAME = 560

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

LOCAL_PORT = 5000
_CHARTS = "workflowType=machine_learning&compareRunsMode=CHART"


def share_key(sweep_id: str, kind: str = EVERY_SAMPLE) -> str:
    """Return what names a view of the sweep in an address."""
    return f"ladezeit-{projection.sweep_tag(sweep_id)}{kind}"


def tag_key(sweep_id: str, kind: str = EVERY_SAMPLE) -> str:
    """Return the experiment's tag that holds a view of the sweep."""
    return f"mlflow.sharedViewState.{share_key(sweep_id, kind)}"


def save_views(store: Store, record: SweepRecord) -> None:
    """Write the sweep's views into its experiment and color its runs by point.

    Raises:
        TrackingError: it is not known whether the store's MLflow reads the format.
        Exception: whatever MLflow raises.
    """
    _check_format(store.mlflow_version)
    client, experiment_id, condition = store.client, store.experiment_id, sample_condition(record.id)
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
    _color(client, runs, keys)


def _check_format(version: str) -> None:
    found = re.match(r"(\d+)\.(\d+)", version)
    least, beyond = KNOWN_FORMAT
    if not found or not least <= (int(found[1]), int(found[2])) < beyond:
        raise TrackingError(
            f"MLflow {version or 'of an unknown version'} may read another format (known: from {least[0]}.{least[1]}, "
            f"before {beyond[0]}.{beyond[1]}); the samples are found by search instead"
        )


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


def _color(client: Any, runs: Sequence[Any], keys: Sequence[str]) -> None:
    """Give all samples of a point one colour."""
    points = {run.info.run_id: tuple(run.data.params.get(key, "") for key in keys) for run in runs}
    order = sorted(set(points.values()))
    for run_id, point in points.items():
        client.set_tag(run_id, "mlflow.runColor", COLORS[order.index(point) % len(COLORS)])


# The charts of a sweep's saved view, in the words of MLflow's interface (undocumented, read off 3.17).


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


# Where a person finds a sweep or a run in MLflow's interface.


def comparison_address(store: Store, of: SweepRecord | str | None, *, views_saved: Collection[str]) -> str:
    """Return the lines to print: for a database the command that starts the interface, then the pages to open.

    `of` is a sweep (its comparison), a run's id (that run) or None (the experiment); `views_saved` are the keys of the
    experiment's tags.
    """
    is_server = store.uri.startswith("http")
    base = without_credentials(store.uri).rstrip("/") if is_server else f"http://127.0.0.1:{LOCAL_PORT}"
    if isinstance(of, SweepRecord):
        found = sweep_pages(store, of.id, base, views_saved)
    elif of is None:
        found = {"experiment": f"{base}/#/experiments/{store.experiment_id}/runs?{_CHARTS}"}
    else:
        found = {"run": f"{base}/#/experiments/{store.experiment_id}/runs/{of}?workflowType=machine_learning"}
    start = "" if is_server else f" start\n  {ui_command(store)}\nand open"
    return f"compare in MLflow:{start}\n{list_pages(found)}"


def list_pages(pages: dict[str, str]) -> str:
    """Return pages as lines, one a page, its title first."""
    width = max(map(len, pages))
    return "\n".join(f"  {title:<{width}}  {page}" for title, page in pages.items())


def sweep_pages(store: Store, sweep_id: str, base: str, views_saved: Collection[str]) -> dict[str, str]:
    """Return the pages of a sweep below the interface's address `base`, by title; without its views, a search."""
    runs = f"{base}/#/experiments/{store.experiment_id}/runs?"
    if tag_key(sweep_id) not in views_saved:
        return {"charts": f"{runs}searchFilter={quote(sample_condition(sweep_id))}&{_CHARTS}"}
    every = f"{runs}viewStateShareKey={share_key(sweep_id)}"
    pages = {"charts": f"{every}&{_CHARTS}", "table": f"{every}&workflowType=machine_learning"}
    if tag_key(sweep_id, AVERAGES) in views_saved:
        averages = f"{runs}viewStateShareKey={share_key(sweep_id, AVERAGES)}"
        pages["averages"] = f"{averages}&workflowType=machine_learning"
    return pages


def ui_command(store: Store) -> str:
    """Return the shell command that serves the store's interface on this machine alone."""
    own = Path(sys.executable).parent / "ladezeit-results"
    program = str(own) if own.exists() and shutil.which("ladezeit-results") != str(own) else "ladezeit-results"
    default = Path(os.environ.get("LADEZEIT_OUTPUTS", "outputs")).absolute() / DATABASE_FILE
    if store.database == default and "MLFLOW_TRACKING_URI" not in os.environ:
        return f"{shlex.quote(program)} ui"
    return f"{shlex.quote(program)} ui --tracking-uri {shlex.quote(redact_text(store.uri))}"
