"""The report that a person decides by: true figures, nothing from outside, nothing passed over."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import example_results as example
import planted
from ladezeit.analysis.eligibility import format_value
from ladezeit.errors import LadezeitError
from ladezeit.report import fault_catches
from ladezeit.report.comparison_table import flatten_records
from ladezeit.report.document import build_report
from ladezeit.report.render import archive_report, as_html, draw_pictures, without_folders, write_report
from ladezeit.report.timeline import median_sample
from ladezeit.results.reader import Samples, read_paths
from ladezeit.results.records import Result, Status

EVIL = "<script>alert(1)</script> [here](https://evil.example/x) <https://evil.example/y> ![p](https://evil.example/z)"


class Page(HTMLParser):
    """Collects what a browser would follow or run, and whether all that is opened is closed."""

    VOID = ("meta", "br", "hr", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.drawings: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.tags.add(tag)
        self.addresses += [own[key] or "" for key in ("href", "xlink:href", "src", "action", "data") if key in own]
        if own.get("role") == "img":
            self.drawings.append(own.get("aria-label") or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def samples_of(results: list[Result]) -> Samples:
    return Samples(results=results, places=[f"somewhere/{result.identity.job}" for result in results])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted sweep on disk: methods alike and slower, one wrong, one failing, one unproven; a damaged file."""
    made = planted.sweep(5, planted.TRUTH | {"legacy_manager": 1.0})
    next(one for one in made if one.status is Status.wrong).reason = EVIL
    folder = planted.write(tmp_path_factory.mktemp("out puts") / "sweeps" / "planted", made, planned=len(made) + 3)
    damaged = folder / "999" / "result.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    return folder


@pytest.fixture(scope="module")
def written(sweep: Path) -> list[Path]:
    """The report as the installed command writes it, where it says it did."""
    script = Path(sys.executable).with_name("ladezeit-results")
    done = subprocess.run([str(script), "report", str(sweep)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def test_the_files_lie_beside_the_sweep(sweep: Path, written: list[Path]) -> None:
    assert [path.name for path in written[:2]] == ["report.md", "report.html"]
    assert all(path.parent == sweep / "report" and path.is_file() for path in written)
    assert sum(path.suffix == ".png" for path in written) >= 5


def test_the_answer_comes_first(written: list[Path]) -> None:
    """Who reads only the first lines knows which method to take."""
    lines = [line for line in written[0].read_text(encoding="utf-8").splitlines() if line]
    assert "not distinguishable" in lines[3] and "is significantly faster than" in lines[3]
    assert lines[4].startswith("![Load times of")


def test_the_figures_are_those_of_compare(sweep: Path, written: list[Path]) -> None:
    """Each cell of the tables is a figure of `compare --format json`: the report computes nothing of its own."""
    expected = json.loads(json.dumps(flatten_records(build_report(read_paths([sweep])).load)))
    text = written[0].read_text(encoding="utf-8").split("### All methods")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    table = {row[1]: dict(zip(rows[0], row, strict=True)) for row in rows[2:] if len(row) == len(rows[0])}
    ranked = [record for record in expected if record["rank"] is not None]
    assert len(ranked) == 5 and set(table) == {record["loading"] for record in ranked}
    for record in ranked:
        row, metric = table[record["loading"]], record["metric"]
        assert (int(row["#"]), int(row["n"])) == (record["rank"], record["n"])
        assert row["median s"] == format_value(record["median"], metric)
        interval = f"{format_value(record['interval_low'], metric)}–{format_value(record['interval_high'], metric)}"
        assert row["interval"] == interval


def test_the_page_needs_nothing_and_leads_nowhere(written: list[Path]) -> None:
    """It opens offline, years later; an error message from a checkpoint can neither run nor link anything."""
    text = written[1].read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "iframe", "object", "form", "img"}
    assert all(not urlsplit(address).scheme and not urlsplit(address).netloc for address in page.addresses)
    assert re.findall(r"url\((?!#)", text) == [] and "@import" not in text
    assert "default-src 'none'" in text and "&lt;script&gt;alert(1)" in text


def test_every_picture_says_in_words_what_it_shows(written: list[Path]) -> None:
    markdown, page = written[0].read_text(encoding="utf-8"), Page(written[1].read_text(encoding="utf-8"))
    images = re.findall(r"^!\[(.+)\]\((.+)\)$", markdown, re.MULTILINE)
    assert len(images) == len(page.drawings) == sum(path.suffix == ".png" for path in written)
    assert all(len(alt) > 40 and (written[0].parent / name).is_file() for alt, name in images)
    assert all(len(words) > 40 for words in page.drawings)
    assert "slow 6." in page.drawings[0], "the figures stand in the words too"


def test_every_link_to_a_raw_file_works_from_where_the_report_lies(written: list[Path]) -> None:
    page = Page(written[1].read_text(encoding="utf-8"))
    links = [address for address in page.addresses if address.endswith("result.json")]
    assert len(links) == 8 * 5
    assert all((written[1].parent / unquote(link)).is_file() for link in links)


def test_what_is_not_in_the_figures_is_named(written: list[Path]) -> None:
    """Wrong, failing, unproven, damaged, never measured: each has its line with the reason."""
    text = written[0].read_text(encoding="utf-8")
    assert "offloader" in text and "5 of 5 wrong" in text and "no kernel image is available" in text
    assert "999/result.json" in text and "3 planned samples have no result" in text
    assert "ladezeit -m loading=slow cache=warm 'sample=range(5)'" in text
    assert "NVIDIA H100" in text.split("## Environment")[1]


def test_the_heading_says_what_was_compared(written: list[Path]) -> None:
    """A report that is opened a month later, or from a tab among others, says what it is about."""
    heading = "Load times of 8 methods on qwen2.5-7b-shape, warm cache (planted)"
    assert written[0].read_text(encoding="utf-8").startswith(f"# {heading}\n")
    assert f"<title>{heading}</title>" in written[1].read_text(encoding="utf-8")


def test_only_the_case_studys_own_report_has_its_table(written: list[Path]) -> None:
    assert "Comparison with the case study" not in written[0].read_text(encoding="utf-8")


def test_the_case_study_stands_beside_what_was_measured(tmp_path: Path) -> None:
    """Before and after, in its own columns, with its figures: who knows that case sees whether theirs is one."""
    made = planted.sweep(5, planted.TRUTH | {"legacy_manager": 1.0}, bad=False)
    folder = planted.write(tmp_path / "sweep", made, title="origin_case")
    report, *_ = write_report(build_report(read_paths([folder])), tmp_path / "report", "report")
    text = report.read_text(encoding="utf-8").split("### Comparison with the case study")[1].split("###")[0]
    lines = [line for line in text.splitlines() if line]
    assert lines[0] == "| method | load s | first token s | GPU memory GiB | status |"
    assert "| 180.9 | 0.770 | 14.21 | ok |" in lines[2] and "| 4.790 | 0.110 | 14.19 | ok |" in lines[3]
    assert lines[4].startswith("| here: legacy_manager | 17") and lines[4].endswith("5 ok |")
    assert any(line.startswith("| here: cuda_fp16 | 4.") for line in lines)
    said = "\n".join(line for line in lines if line.startswith("- "))
    assert "37.8 times as long as the same settings alone" in said
    ratio = re.search(r"legacy_manager takes ([\d.]+) times as long as cuda_fp16", said)
    assert ratio and 35 < float(ratio[1]) < 45, said
    assert "in load/module_walk" in said and "the settings are not the cause" in said
    assert "NVIDIA H100" in said and "does not name its GPU" in said


def test_the_origin_case_is_left_out_where_nothing_is_like_it(tmp_path: Path) -> None:
    for first in ("cuda_fp16", "legacy_manager"):
        samples = samples_of(planted.sweep(5, {first: 1.0, "slow": 1.5}))
        text = write_report(build_report(samples), tmp_path / first, "r")[0].read_text(encoding="utf-8")
        assert "case study" not in text


def test_what_validation_costs_stands_beside_what_it_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The catch comes from the packaged figures; without them the cost is drawn alone, and the text says so."""
    made = []
    for number in range(5):
        for level, cost_s in (("none", 0.0), ("placement", 0.05), ("content", 2.0)):
            one = planted.sample("transformers", number, 1.0, job=len(made))
            one.identity = type(one.identity)(**{**one.identity.__dict__, "point": level})
            one.config["validation"] = {"level": level}
            one.proof = {"level": level, "ran": level != "none", "passed": level != "none", "reason": "so"}
            one.metrics["validation/total_s"] = cost_s
            made.append(one)
    packaged = tmp_path / "fault_catches.json"
    monkeypatch.setattr(fault_catches, "files", lambda _: tmp_path)
    alone = build_report(samples_of(made))
    picture = next(p for p in draw_pictures(alone, "r")[0].leading if p.name.endswith("validation"))
    assert "content 2.000 s" in picture.alt and "finds" not in picture.alt
    assert "only the cost is shown" in write_report(alone, tmp_path / "alone", "r")[0].read_text(encoding="utf-8")
    packaged.write_text(
        json.dumps({"levels": {"placement": {"found": 7, "of": 17}, "content": {"found": 16, "of": 17}}})
    )
    both = build_report(samples_of(made))
    picture = next(p for p in draw_pictures(both, "r")[0].leading if p.name.endswith("validation"))
    assert "placement 0.050 s, finds 7 of 17" in picture.alt and "none 0.000 s;" in picture.alt
    assert "only the cost is shown" not in write_report(both, tmp_path / "both", "r")[0].read_text(encoding="utf-8")


def test_the_packaged_catches_are_read() -> None:
    """What the fault bench measured is what the picture shows: full finds everything, none does not."""
    found = fault_catches.fault_catches()
    assert found["full"].found == found["full"].of > found["none"].found
    assert {"none", "sampled", "placement", "content", "full"} <= set(found)


def test_kept_results_can_be_judged_again_and_say_nothing_private(sweep: Path, tmp_path: Path) -> None:
    """The raw file gives the same comparison as the sweep's folder; nobody's folders or passwords are in it."""
    samples = read_paths([sweep])
    for result in samples.results:
        result.config["outputs"] = "/home/somebody/outputs"
        result.environment = {**result.environment, "cache": "/home/somebody/cache/model.safetensors"}
        result.effective["from"] = "https://user:password@host/models"
    paths = archive_report(build_report(samples), tmp_path, "planted")
    assert [path.name for path in paths[:2]] == ["planted.md", "planted.jsonl"]
    for path in paths[:2]:
        text = path.read_text(encoding="utf-8")
        assert "somebody" not in text and "password" not in text and str(sweep.parent) not in text
    again = read_paths([tmp_path / "planted.jsonl"])
    assert flatten_records(build_report(again).load) == flatten_records(build_report(samples).load)
    with pytest.raises(LadezeitError, match="kept already"):
        archive_report(build_report(samples), tmp_path, "planted")


def test_a_damaged_line_of_kept_results_hides_no_other(sweep: Path, tmp_path: Path) -> None:
    kept = archive_report(build_report(read_paths([sweep])), tmp_path, "planted")[1]
    kept.write_text(kept.read_text(encoding="utf-8") + "{}\nnonsense\n")
    read = read_paths([kept])
    assert len(read.results) == 40 and len(read.unreadable) == 2 and "planted.jsonl:41" in read.unreadable[0]


@pytest.mark.parametrize("name", ["a/b", "../x", ".hidden", ""])
def test_a_name_never_leads_out_of_the_folder(sweep: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(LadezeitError, match="--name"):
        write_report(build_report(read_paths([sweep])), tmp_path, name)


@pytest.mark.parametrize(
    "results",
    [
        [example.result()],
        [example.not_ok(Status.oom, "out of memory")],
        [example.not_ok(Status.skipped, "not here"), example.result(job=1)],
    ],
    ids=["one sample", "none is ok", "one was skipped"],
)
def test_there_is_a_report_however_little_was_measured(results: list[Result], tmp_path: Path) -> None:
    page = write_report(build_report(samples_of(results)), tmp_path, "r")[1].read_text(encoding="utf-8")
    assert Page(page).open == []


def test_many_methods_stay_a_picture(tmp_path: Path) -> None:
    """Sixty methods are a table; the picture holds the best of them and says how many it leaves out."""
    made = [planted.sample(f"method_{i}", n, 1 + i / 10, job=60 * n + i) for n in range(2) for i in range(60)]
    (drawn,) = draw_pictures(build_report(samples_of(made)), "r")
    assert "20 more are in the table only" in drawn.leading[0].caption


def test_drawing_again_gives_the_same_bytes_and_leaves_nothing_behind(sweep: Path) -> None:
    """A report under version control changes when its figures do, not with every run; no backend is chosen."""
    pyplot = "matplotlib.pyplot" in sys.modules
    report = build_report(read_paths([sweep]))
    one, other = ([(p.svg, p.png) for p in draw_pictures(report, "r")[0].all] for _ in range(2))
    assert one == other
    assert ("matplotlib.pyplot" in sys.modules) is pyplot


def test_the_timeline_shows_the_sample_nearest_to_the_median() -> None:
    point = next(
        own for own in build_report(samples_of(planted.sweep(5))).load.sections[0].ranked if own.name == "slow"
    )
    chosen = median_sample(point)
    assert chosen is not None and point.spread is not None
    assert chosen.metrics["load/total_s"] == point.spread.median


def test_folders_are_cut_and_facts_are_not() -> None:
    assert without_folders("in /home/me/a b/x.json, 1.2/3.4 GB/s, load/read, /dev/vda on /, https://h/a/b") == (
        "in …/a b/x.json, 1.2/3.4 GB/s, load/read, /dev/vda on /, https://h/a/b"
    )


def test_a_drawing_keeps_its_own_parts() -> None:
    """Drawings on one page share names inside; none may show another's parts."""
    drawn = draw_pictures(build_report(samples_of(planted.sweep(5))), "r")[0].all
    text = as_html("\n\n".join(f"![a]({picture.name}.png)" for picture in drawn), drawn, "t")
    defined = re.findall(r'\bid="([^"]+)"', text)
    assert len(defined) == len(set(defined))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(defined)
