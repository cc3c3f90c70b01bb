"""What a person sees in a browser after copying the two lines that a sweep prints."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from example_results import record, sweep_results, write_sample
from real_parts import answers, free_port, running

from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.result import SweepRecord
from ladezeit.results.labels import labels
from ladezeit.results.table import as_markdown
from ladezeit.results.timeline import draw
from ladezeit.results.varying import varying_values
from ladezeit.tracking import SweepStatus, open_tracker

pytestmark = [pytest.mark.browser, pytest.mark.slow]

WAIT_MS = 60_000


class Pages:
    """The interface of a store, served by the printed command."""

    def __init__(self, sweep: SweepRecord, comparison: str, runs: dict[str, str], shots: Path) -> None:
        self.sweep, self.comparison, self.runs, self.shots = sweep, comparison, runs, shots


def track_sweep(tracker: Any, folder: Path) -> tuple[SweepRecord, dict[str, str]]:
    """Write a whole sweep; returns its record and the run ids by name."""
    sweep = tracker.begin_sweep(record(), folder)
    results = list(sweep_results(3))
    names = labels([(varying_values(measured, sweep.varying), measured.identity.sample) for measured in results])
    runs = {}
    for measured, name in zip(results, names, strict=True):
        measured.identity = replace(measured.identity, label=name)
        own = write_sample(folder / str(measured.identity.job), measured)
        draw(measured, own / "timeline.png")
        runs[name] = tracker.log_sample(measured, own, sweep, sweep.varying)
    tracker.end_sweep(sweep, SweepStatus.FINISHED, as_markdown(results, sweep.varying))
    return sweep, runs


@pytest.fixture(scope="module")
def pages(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    folder = tmp_path_factory.mktemp("pages")
    tracker = open_tracker(TrackingConfig(kind=TrackingKind.sqlite), folder / "outputs")
    sweep, runs = track_sweep(tracker, folder)
    port = free_port()
    said = tracker.address(sweep).replace("--port 5000", f"--port {port}").replace(":5000/", f":{port}/")
    command = next(line.strip() for line in said.splitlines() if " ui " in line)
    comparison = said.splitlines()[-1].strip()
    served = folder / "served from here"
    served.mkdir()
    with running(command, lambda: answers(f"http://127.0.0.1:{port}"), served / "ui.log"):
        yield Pages(sweep, comparison, runs, folder)
        left = {path.name for path in served.iterdir()}
    assert left == {"ui.log"}, "the command leaves nothing where it was started"
    assert shlex.split(command)


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    own = browser.new_page(viewport={"width": 1600, "height": 1300})
    own.set_default_timeout(WAIT_MS)
    # A first visit opens MLflow's assistant over a third of the page; whoever has closed it once never sees it again.
    own.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
    yield own
    own.close()


def scroll_to(page: Any, text: str) -> None:
    """Turn the wheel over the charts, which are drawn as they come into sight, until `text` is there."""
    page.mouse.move(1000, 900)
    for _ in range(30):
        if page.get_by_text(text).count():
            break
        page.mouse.wheel(0, 200)
        page.wait_for_timeout(200)
    page.get_by_text(text).first.scroll_into_view_if_needed()


def test_the_printed_address_opens_the_comparison_as_charts(pages: Pages, page: Any) -> None:
    """One click from the terminal: bars of the load, what varies in parallel coordinates, every sample by name."""
    page.goto(pages.comparison)
    page.get_by_text("Load and first answer").wait_for()
    page.get_by_text("30 matching runs").wait_for()
    page.get_by_role("link", name="warm·cuda_fp16·#1").first.wait_for()
    page.locator(".main-svg .barlayer .point").first.wait_for()
    page.get_by_text("What varies, against the load").wait_for()
    page.screenshot(path=pages.shots / "charts.png")
    page.get_by_text("What varies, against the load").scroll_into_view_if_needed()
    page.get_by_text("Parallel Coordinates").first.wait_for()
    scroll_to(page, "load/module_walk_s")
    page.wait_for_timeout(1000)
    page.screenshot(path=pages.shots / "phases.png")
    assert page.get_by_text(re.compile("something went wrong", re.IGNORECASE)).count() == 0


def test_the_same_view_as_a_table_is_sorted_by_the_load(pages: Pages, page: Any) -> None:
    """The table shows what varied and the load, fastest first, without any click."""
    page.goto(pages.comparison.replace("&compareRunsMode=CHART", ""))
    for column in ("params.`cache`", "params.`loading`", "tags.`ladezeit.status`", "metrics.`load/total_s`"):
        page.locator(f'.ag-header-cell[col-id="{column}"]').wait_for()
    cells = page.locator('.ag-cell[col-id="metrics.`load/total_s`"]')
    cells.first.wait_for()
    page.wait_for_timeout(1000)
    shown = [float(text) for text in cells.all_inner_texts() if text.strip() not in ("", "-")]
    page.screenshot(path=pages.shots / "table.png")
    assert len(shown) > 15
    assert shown == sorted(shown)
    assert page.get_by_role("link", name="origin_case").count() == 0, "the parent run is no row among its samples"


def test_a_runs_timeline_opens_in_the_artifact_view(pages: Pages, page: Any) -> None:
    """The picture of where the time went is one click away in the run."""
    run_id = pages.runs["warm·l_manager·#0"]
    start = pages.comparison.split("/runs?")[0]
    page.goto(f"{start}/runs/{run_id}/artifacts/timeline.png")
    picture = page.locator("img[src*='timeline.png'], img[src^='blob:']").first
    picture.wait_for()
    page.wait_for_function("element => element.complete && element.naturalWidth > 500", arg=picture.element_handle())
    page.screenshot(path=pages.shots / "timeline.png")


def test_the_sweeps_own_run_shows_the_table(pages: Pages, page: Any) -> None:
    """The parent run's description is the table of the sweep, with the command to repeat it."""
    start = pages.comparison.split("/runs?")[0]
    page.goto(f"{start}/runs/{pages.sweep.parent_run_id}?workflowType=machine_learning")
    page.get_by_text("Show more").click()
    page.locator("table td", has_text="device_map_auto_max_memory").first.wait_for()
    page.get_by_text("ladezeit experiment=origin_case").first.wait_for()
    page.screenshot(path=pages.shots / "sweep.png")


def test_a_runs_description_shows_command_phases_and_picture(pages: Pages, page: Any) -> None:
    """Who opens a run reads how it ended and where the time went before anything else."""
    start = pages.comparison.split("/runs?")[0]
    page.goto(f"{start}/runs/{pages.runs['cold·cuda_fp16·#0']}?workflowType=machine_learning")
    page.get_by_text("Show more").click()
    page.locator("table td", has_text="load/read").first.wait_for()
    picture = page.locator("img[src*='timeline.png']").first
    picture.wait_for()
    page.wait_for_function("element => element.complete && element.naturalWidth > 500", arg=picture.element_handle())
    page.screenshot(path=pages.shots / "run.png")
