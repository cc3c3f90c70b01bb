"""`ladezeit-results` as a person or a script meets it: real processes, exit codes, formats that can be read back."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import planted
from ladezeit.analysis.comparison import compare_points
from ladezeit.results.records import SweepRecord

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the installed console script in a folder of its own."""
    script = Path(sys.executable).with_name("ladezeit-results")

    def started(*arguments: str | Path, columns: int = 120) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COLUMNS": str(columns)}
        return subprocess.run(
            [str(script), *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return started


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted sweep: three equal methods, one slow, one wrong, one failing, one unproven."""
    return planted.write(tmp_path_factory.mktemp("outputs") / "sweeps" / "planted", planted.sweep())


def test_help_names_every_command(run: Run) -> None:
    shown = run("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("compare", "verdict", "report", "show", "rerun"))


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_and_keeps_figures_whole(run: Run, sweep: Path, columns: int) -> None:
    """No figure is broken over two lines, no line is wider than the terminal."""
    shown = run("compare", sweep, columns=columns)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    slow = next(line for line in lines if " slow " in line)
    assert "1.5" in slow and "5 ok" in slow
    assert "offloader" in shown.stdout and "5 of 5 wrong" in shown.stdout
    assert ("Not shown at this width" in " ".join(shown.stdout.split())) == (columns == 80)


def test_csv_and_json_hold_what_was_computed(run: Run, sweep: Path) -> None:
    expected = compare_points(planted.sweep(), ["loading", "validation"]).sections[0]
    by_name = {point.values["loading"]: point for point in [*expected.ranked, *expected.unranked]}
    table = list(csv.DictReader(io.StringIO(run("compare", sweep, "--format", "csv").stdout)))
    document = json.loads(run("compare", sweep, "--format", "json").stdout)
    assert len(table) == len(document["points"]) == len(by_name) == 7
    for row, record in zip(table, document["points"], strict=True):
        point = by_name[row["loading"]]
        assert row["rank"] == str(point.rank or "") and record["rank"] == point.rank
        if point.spread:
            assert float(row["median"]) == record["median"] == point.spread.median
            assert json.loads(row["counts"]) == record["counts"] == point.counts
        if point.ratio:
            assert float(row["ratio_low"]) == record["ratio_low"] == point.ratio.interval.low
        assert (row["excluded"] or None) == point.excluded


def test_markdown_is_a_table_with_all_columns(run: Run, sweep: Path) -> None:
    text = run("compare", sweep, "--format", "md").stdout
    assert "| # | loading | n | median s | MAD |" in text and "| :-- |" in text


def test_metrics_filters_baselines_and_orders(run: Run, sweep: Path) -> None:
    chosen = run("compare", sweep, "--where", "loading=slow", "--format", "json")
    assert [record["loading"] for record in json.loads(chosen.stdout)["points"]] == ["slow"]
    other = json.loads(run("compare", sweep, "--baseline", "loading=slow", "--format", "json").stdout)
    ratios = {record["loading"]: record["ratio"] for record in other["points"]}
    assert ratios["slow"] is None and ratios["cuda_fp16"] == pytest.approx(1 / 1.5, rel=0.05)
    by_name = json.loads(run("compare", sweep, "--sort", "loading", "--format", "json").stdout)["points"]
    assert [record["loading"] for record in by_name][:4] == sorted(planted.TRUTH)
    rates = json.loads(run("compare", sweep, "--metric", "load/gb_per_s", "--format", "json").stdout)
    ranked = [record["loading"] for record in rates["points"] if record["rank"] is not None]
    assert sorted(ranked) == sorted(planted.TRUTH) and ranked[-1] == "slow", "of rates the highest comes first"
    assert "load/gb_per_s" in rates["metric"] and rates["unit"] == "GB/s"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--metric", "laod"), "Did you mean 'load'"),
        (("--where", "loading=slwo"), "Did you mean 'slow'"),
        (("--where", "laoding=slow"), "Did you mean 'loading'"),
        (("--where", "loading"), "write key=value"),
        (("--baseline", "loading=nobody"), "no verified configuration"),
        (("--baseline", "cache=warm"), "configurations match cache=warm"),
        (("--sort", "colour"), "use one of rank"),
        (("--tracking-uri", "sqlite:////x.db"), "goes with --experiment"),
        (("--experiment", "x"), "not both"),
        (("--format", "xml"), "xml"),
    ],
)
def test_wrong_use_exits_with_2_and_says_what_is_right(
    run: Run, sweep: Path, arguments: tuple[str, ...], said: str
) -> None:
    shown = run("compare", sweep, *arguments)
    assert shown.returncode == 2 and said in shown.stderr and "Traceback" not in shown.stderr


@pytest.mark.parametrize("command", ["compare", "verdict", "show", "rerun"])
def test_nothing_to_read_exits_with_2(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in ((tmp_path / "empty",), (tmp_path / "missing",), ()):
        shown = run(command, *arguments)
        assert shown.returncode == 2 and "outputs/sweeps" in shown.stderr.replace("\n", " ")


def test_the_newest_sweep_is_the_default(run: Run, tmp_path: Path) -> None:
    """It is the one that was started last, whatever its folder is called and however deep it lies."""
    for name, hour, samples in (("z-first", 8, 1), ("by-day/2026/a-last", 10, 2), ("middle", 9, 1)):
        folder = planted.write(tmp_path / "outputs" / "sweeps" / name, planted.sweep(samples=samples))
        own = SweepRecord.read_record(folder)
        replace(own, started_at=f"2026-01-02T{hour:02}:00:00.000+00:00").save_record(folder)
    (tmp_path / "outputs" / "sweeps" / "damaged").mkdir()
    (tmp_path / "outputs" / "sweeps" / "damaged" / "sweep.json").write_text("{")
    shown = run("compare", "--format", "json")
    assert shown.returncode == 0 and "reading outputs/sweeps/by-day/2026/a-last" in shown.stderr
    assert json.loads(shown.stdout)["points"][0]["n"] == 2


def test_damaged_files_are_named_beside_the_answer(run: Run, tmp_path: Path) -> None:
    folder = planted.write(tmp_path / "sweep", planted.sweep())
    (folder / "0" / "result.json").write_text("{")
    shown = run("compare", folder, "--format", "json")
    assert shown.returncode == 0
    assert "1 could not be read" in shown.stderr and "0/result.json" in shown.stderr
    assert len(json.loads(shown.stdout)["unreadable"]) == 1


def test_machines_are_put_side_by_side_only_when_asked(run: Run, tmp_path: Path) -> None:
    made = planted.sweep(bad=False)
    for result in made[::2]:
        result.environment = {**planted.MACHINE, "cpu": {"model": "Xeon", "available": 16}}
    folder = planted.write(tmp_path / "sweep", made)
    refused = run("compare", folder)
    assert refused.returncode == 2 and "cpu: Xeon / AMD EPYC 9454" in refused.stderr
    shown = run("compare", folder, "--across-machines")
    assert shown.returncode == 0 and "Xeon" in shown.stdout


def test_the_verdict_in_words_and_as_json_agree(run: Run, sweep: Path) -> None:
    words = run("verdict", sweep, "--current", "loading=slow", "--format", "md")
    document = json.loads(run("verdict", sweep, "--current", "loading=slow", "--format", "json").stdout)
    (decision,) = document["decisions"]
    assert words.returncode == 0 and "not distinguishable" in words.stdout
    assert decision["objectives"]["load"]["state"] == "shared"
    assert decision["current"]["optimal"] is False and decision["current"]["ratio"]["low"] < 1.5
    for step in decision["what_to_do"]:
        assert step["text"] in words.stdout
    assert decision["answer"][1:] in words.stdout
    assert {entry["name"].split(" ·")[0] for entry in decision["not_ranked"]} == {"offloader", "broken", "unchecked"}


def test_the_verdict_is_an_answer_even_where_nothing_is_ok(run: Run, tmp_path: Path) -> None:
    folder = planted.write(tmp_path / "sweep", [planted.failed("broken", n, n) for n in range(5)])
    for command in ("compare", "verdict"):
        shown = run(command, folder)
        assert shown.returncode == 0, shown.stderr
        assert "no kernel image is available" in shown.stdout


def test_profiles_are_written_in_both_forms(run: Run, sweep: Path, tmp_path: Path) -> None:
    assert run("verdict", sweep, "--write-profile", tmp_path / "p.yaml").returncode == 0
    assert run("verdict", sweep, "--write-profile", tmp_path / "p.json").returncode == 0
    models = yaml.safe_load((tmp_path / "p.yaml").read_text())["models"]
    assert models["qwen2.5-7b-shape"][0]["overrides"] == ["loading=transformers"]  # the current one of three equals
    assert json.loads((tmp_path / "p.json").read_text())["qwen2.5-7b-shape"]["loading"]["torch_dtype"] == "float16"
    refused = run("verdict", sweep, "--write-profile", tmp_path / "no" / "p.yaml")
    assert refused.returncode == 2 and "cannot be written" in refused.stderr


def test_a_profiles_words_are_taken_by_ladezeit(run: Run, sweep: Path, tmp_path: Path) -> None:
    """`overrides` of a profile compose to the same loading method that was measured."""
    run("verdict", sweep, "--write-profile", tmp_path / "p.yaml", "--current", "loading=cuda_fp16")
    (entry,) = yaml.safe_load((tmp_path / "p.yaml").read_text())["models"]["qwen2.5-7b-shape"]
    script = Path(sys.executable).with_name("ladezeit")
    words = [str(script), "model=tiny", *entry["overrides"], "--cfg", "job"]
    shown = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    composed = yaml.safe_load(shown.stdout)["loading"]
    assert composed["name"] == entry["loading"]["name"] == "cuda_fp16"
    assert composed["dtype"] == entry["loading"]["dtype"] and composed["engine"] == entry["loading"]["engine"]


def test_show_says_first_how_the_sample_ended(run: Run, sweep: Path) -> None:
    good = run("show", sweep / "0")
    assert good.stdout.splitlines()[0].startswith("ok ")
    assert re.search(r"├── read +\d+\.\d+ s +\d+\.\d % █", good.stdout)
    assert str(sweep / "0" / "result.json") in good.stdout
    failed = run("show", sweep, "--job", "5")
    assert failed.stdout.splitlines()[0].startswith("failed") and "no kernel image" in failed.stdout.splitlines()[1]
    unchecked = run("show", sweep, "--where", "loading=unchecked", "--where", "sample=0")
    assert "not ranked: the verification did not run" in unchecked.stdout


def test_show_lists_the_samples_where_several_fit(run: Run, sweep: Path) -> None:
    shown = run("show", sweep)
    assert shown.returncode == 2 and "--job 0" in shown.stderr


def test_rerun_prints_the_command_and_nothing_else(run: Run, sweep: Path) -> None:
    one = run("rerun", sweep, "--job", "0")
    assert one.stdout == "ladezeit model=qwen2.5-7b-shape loading=cuda_fp16 cache=warm sample=0\n"
    point = run("rerun", sweep, "--job", "0", "--samples", "10")
    assert point.stdout == "ladezeit -m loading=cuda_fp16 cache=warm 'sample=range(10)'\n"
