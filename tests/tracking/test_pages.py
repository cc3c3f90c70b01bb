"""What a person sees in a browser after a real sweep and the one command that it prints."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_parts import answers

from ladezeit.results.records import SweepRecord

pytestmark = [pytest.mark.browser, pytest.mark.slow]

WAIT_MS = 60_000
METHODS = ("transformers", "cuda_fp16", "legacy_manager")
SWEEP = ["-m", "model=tiny", f"loading={','.join(METHODS)}", "cache=cold,warm", "sample=range(2)"]
REPORT = "<html><body><h1>The fastest is transformers</h1></body></html>"


@dataclass
class Pages:
    """The interface of a store, served by the printed command; `at` are the pages that it names, by title."""

    sweep: SweepRecord
    folder: Path
    at: dict[str, str]
    shots: Path

    @property
    def start(self) -> str:
        """The experiment's address."""
        return self.at["charts"].split("/runs?")[0]

    def run_of(self, number: int) -> str:
        """Return the id of a sample's run."""
        return (self.folder / str(number) / ".mlflow_run_id").read_text().strip()


def measured_sweep(place: Path) -> tuple[Path, str]:
    """Measure a real sweep of model=tiny in `place`; returns its folder and the command that it prints at its end."""
    script = Path(sys.executable).with_name("ladezeit")
    words = [str(script), *SWEEP, "process=prewarmed", "discard_first=false", "ceilings=false", "title=three methods"]
    # Files of its own: those that another test has mapped cannot be dropped from the page cache.
    own = {**os.environ, "LADEZEIT_CACHE": str(place.with_name(f"{place.name}-cache"))}
    done = subprocess.run(words, cwd=place, env=own, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    (folder,) = (place / "outputs" / "sweeps").iterdir()
    return folder, said[said.index("compare in MLflow: start") + 1].strip()


def log_report(place: Path, sweep: SweepRecord, folder: Path) -> None:
    """Attach a report and a picture to the sweep's own run, as a sweep attaches its files."""
    from ladezeit.config import TrackingConfig, TrackingKind
    from ladezeit.tracking import open_tracker

    (folder / "report.html").write_text(REPORT)
    (folder / "picture.png").write_bytes((folder / "0" / "timeline.png").read_bytes())
    tracker: Any = open_tracker(TrackingConfig(kind=TrackingKind.sqlite), place / "outputs")
    for name in ("report.html", "picture.png"):
        tracker.store.client.log_artifact(sweep.parent_run_id, str(folder / name))


@pytest.fixture(scope="module")
def pages(
    browser: Any, tmp_path_factory: pytest.TempPathFactory, with_store: Callable[[Path], Path]
) -> Iterator[Pages]:
    place = tmp_path_factory.mktemp("pages")
    with_store(place / "outputs")
    folder, command = measured_sweep(place)
    sweep = SweepRecord.read_record(folder)
    log_report(place, sweep, folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [*shlex.split(command), "--port", str(port)]
        served = subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert served.stdout
            lines = list(iter(served.stdout.readline, "Ctrl-C ends it\n"))
            at = dict(re.findall(r"^ +(\w+) +(http\S+)$", "".join(lines), re.MULTILINE))
            assert f"newest sweep, three methods ({sweep.id}):\n" in lines
            assert f":{port}/" not in at["charts"], "a port that is taken is not used"
            yield Pages(sweep, folder, at, place)
        finally:
            check_end(served, at)
    assert {path.name for path in place.iterdir() if path.suffix != ".png"} == {"outputs"}, (
        "nothing is left lying about"
    )


def check_end(served: "subprocess.Popen[str]", at: dict[str, str]) -> None:
    """Press Ctrl-C and see that nothing is left running."""
    children = psutil.Process(served.pid).children(recursive=True)
    served.send_signal(signal.SIGINT)
    assert served.wait(30) == 0
    assert served.stdout and served.stdout.read().endswith("ended\n")
    assert children and not psutil.wait_procs(children, timeout=10)[1]
    assert not answers(at["charts"].split("/#")[0])


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    own = browser.new_page(viewport={"width": 1600, "height": 1300})
    own.set_default_timeout(WAIT_MS)
    # A first visit opens MLflow's assistant over a third of the page; whoever has closed it once never sees it again.
    own.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
    yield own
    assert own.get_by_text(re.compile("something went wrong", re.IGNORECASE)).count() == 0
    own.close()


def scroll_to(page: Any, text: str) -> None:
    """Turn the wheel over the charts, which are drawn as they come into sight, until `text` is there."""
    page.mouse.move(1000, 900)
    for _ in range(40):
        if page.get_by_text(text).count():
            break
        page.mouse.wheel(0, 200)
        page.wait_for_timeout(200)
    page.get_by_text(text).first.scroll_into_view_if_needed()


def test_the_printed_address_opens_the_comparison_as_charts(pages: Pages, page: Any) -> None:
    """One click from the terminal: bars, what varies in parallel coordinates, time against memory, differences."""
    page.goto(pages.at["charts"])
    page.get_by_text("Load and first answer").wait_for()
    page.get_by_text("12 matching runs").wait_for()
    page.get_by_role("link", name="warm·cuda_fp16·#1").first.wait_for()
    page.locator(".main-svg .barlayer .point").first.wait_for()
    page.screenshot(path=pages.shots / "charts.png")
    scroll_to(page, "Parallel Coordinates")
    scroll_to(page, "load/total_s vs. memory/host_peak_rss_gib")
    page.locator(".main-svg .scatterlayer .point").first.wait_for()
    page.screenshot(path=pages.shots / "relations.png")
    scroll_to(page, "Show differences only")
    page.wait_for_timeout(1000)
    page.screenshot(path=pages.shots / "differences.png")
    scroll_to(page, "load/module_walk_s")
    page.wait_for_timeout(1000)
    page.screenshot(path=pages.shots / "phases.png")


def test_the_same_view_as_a_table_is_sorted_by_the_load(pages: Pages, page: Any) -> None:
    """The table shows what varied and the load, fastest first, without any click."""
    page.goto(pages.at["table"])
    for column in ("params.`cache`", "params.`loading`", "tags.`ladezeit.status`", "metrics.`load/total_s`"):
        page.locator(f'.ag-header-cell[col-id="{column}"]').wait_for()
    cells = page.locator('.ag-cell[col-id="metrics.`load/total_s`"]')
    cells.first.wait_for()
    page.wait_for_timeout(1000)
    shown = [float(text) for text in cells.all_inner_texts() if text.strip() not in ("", "-")]
    page.screenshot(path=pages.shots / "table.png")
    assert len(shown) == 12
    assert shown == sorted(shown)
    assert page.get_by_role("link", name="three methods").count() == 0, "the parent run is no row among its samples"


def test_averages_answer_which_method_without_a_click(pages: Pages, page: Any) -> None:
    """One row a point, fastest first, its name readable, each over its samples; as charts one bar a point."""
    page.goto(pages.at["averages"])
    for method in METHODS:
        page.get_by_text(f"Group: cache: warm, loading: {method}").first.wait_for()
    cells = page.locator('.ag-cell[col-id="metrics.`load/total_s`"]')
    page.wait_for_timeout(1000)
    shown = [float(text.split()[0]) for text in cells.all_inner_texts() if "average" in text]
    page.screenshot(path=pages.shots / "averages.png")
    assert len(shown) == 6 and shown == sorted(shown)
    assert page.get_by_role("link", name="warm·cuda_fp16·#1").count() == 0, "the groups are folded"
    page.goto("about:blank")
    page.goto(pages.at["averages"] + "&compareRunsMode=CHART")
    page.locator(".main-svg .barlayer .point").first.wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path=pages.shots / "averages-charts.png")
    assert page.locator(".main-svg").first.locator(".barlayer .point").count() == 6


def test_samples_are_nested_below_their_sweep_and_can_be_compared(pages: Pages, page: Any) -> None:
    """The plain list of runs shows the sweep, its samples below it; two of them go to MLflow's own compare page."""
    page.goto(f"{pages.start}/runs?workflowType=machine_learning")
    page.get_by_role("link", name="three methods").first.wait_for()
    assert page.get_by_role("link", name="warm·cuda_fp16·#1").count() == 0
    page.locator(".ag-cell[col-id='attributes.`Run Name`'] button").first.click()
    page.get_by_role("link", name="warm·cuda_fp16·#1").first.wait_for()
    page.screenshot(path=pages.shots / "nested.png")
    runs = f'?runs=["{pages.run_of(0)}","{pages.run_of(1)}"]&experiments=["{pages.sweep.experiment_id}"]'
    page.goto("about:blank")
    page.goto(f"{pages.start.split('/#')[0]}/#/compare-runs{runs}")
    page.get_by_text("Comparing 2 Runs").first.wait_for()
    names = [SweepRecord.read_record(pages.folder).labels[number] for number in (0, 1)]
    for name in names:
        page.get_by_text(name, exact=True).first.wait_for()
    page.get_by_text("Parallel Coordinates Plot").first.wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path=pages.shots / "compare.png")


def test_pictures_and_reports_open_in_the_artifact_view(pages: Pages, page: Any) -> None:
    """A sample's timeline, and what the sweep's own run holds: a picture and an HTML page, drawn and not downloaded."""
    for run_id, name in ((pages.run_of(0), "timeline.png"), (pages.sweep.parent_run_id, "picture.png")):
        page.goto("about:blank")
        page.goto(f"{pages.start}/runs/{run_id}/artifacts/{name}")
        picture = page.locator(f"img[src*='{name}'], img[src^='blob:']").first
        picture.wait_for()
        wide = "element => element.complete && element.naturalWidth > 500"
        page.wait_for_function(wide, arg=picture.element_handle())
        page.screenshot(path=pages.shots / f"artifact-{name}")
    page.goto("about:blank")
    page.goto(f"{pages.start}/runs/{pages.sweep.parent_run_id}/artifacts/report.html")
    page.frame_locator("iframe").get_by_text("The fastest is transformers").wait_for()
    page.screenshot(path=pages.shots / "artifact-report.png")


def test_a_description_says_first_what_matters(pages: Pages, page: Any) -> None:
    """The sweep's own run shows its table and command; a sample's run its phases and the picture of them."""
    page.goto(f"{pages.start}/runs/{pages.sweep.parent_run_id}?workflowType=machine_learning")
    page.get_by_text("Show more").click()
    page.locator("table td", has_text="legacy_manager").first.wait_for()
    page.get_by_text("ladezeit -m model=tiny").first.wait_for()
    page.screenshot(path=pages.shots / "sweep.png")
    page.goto("about:blank")
    page.goto(f"{pages.start}/runs/{pages.run_of(0)}?workflowType=machine_learning")
    page.get_by_text("Show more").click()
    page.locator("table td", has_text="load/read").first.wait_for()
    picture = page.locator("img[src*='timeline.png']").first
    picture.wait_for()
    page.wait_for_function("element => element.complete && element.naturalWidth > 500", arg=picture.element_handle())
    page.screenshot(path=pages.shots / "run.png")


def test_there_must_be_something_to_show(tmp_path: Path) -> None:
    """Without any store, the command says how to get one, and makes none."""
    script = Path(sys.executable).with_name("ladezeit-results")
    free = {key: value for key, value in os.environ.items() if key not in ("LADEZEIT_OUTPUTS", "MLFLOW_TRACKING_URI")}
    done = subprocess.run([str(script), "ui"], cwd=tmp_path, env=free, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "measure something first" in done.stderr
    assert not list(tmp_path.iterdir())
