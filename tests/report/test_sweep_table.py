"""The table at the end of a sweep, and the results it is made of."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from example_results import not_ok, result, sweep_results, write_sample
from ladezeit.analysis.comparison import compare_points
from ladezeit.errors import LadezeitError
from ladezeit.report.comparison_table import as_markdown
from ladezeit.report.sweep_table import as_rich, sweep_as_markdown
from ladezeit.results.fields import value_of, varying_values
from ladezeit.results.format import format_seconds
from ladezeit.results.reader import gather_results
from ladezeit.results.records import Result, Status

VARYING = ["cache", "loading", "sample"]


def drawn(results: list[Result], varying: list[str], width: int = 120) -> str:
    """Return the table as a terminal of that width shows it."""
    console = Console(file=io.StringIO(), width=width)
    console.print(as_rich(results, varying))
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_each_point_is_one_line_fastest_first_within_model_and_cache() -> None:
    """Cold and warm loads are never ranked against each other; points without a load come last."""
    found = [tuple(row[:4]) for row in rows(sweep_as_markdown(list(sweep_results(5)), VARYING))]
    assert [row[:3] for row in found] == [
        ("cold", "cuda_fp16", "5"),
        ("cold", "device_map_auto", "5"),
        ("cold", "cpu_then_move", "4"),
        ("cold", "legacy_manager", "5"),
        ("cold", "device_map_auto_max_memory", "0"),
        ("warm", "cuda_fp16", "5"),
        ("warm", "device_map_auto_max_memory", "5"),
        ("warm", "device_map_auto", "5"),
        ("warm", "cpu_then_move", "5"),
        ("warm", "legacy_manager", "5"),
    ]


def test_medians_and_ranges_are_those_of_the_ok_samples() -> None:
    """A sample that is not proven must not move the figures; the range is what the samples spanned."""
    results = [result(sample=i, factor=f) for i, f in enumerate((1.0, 3.0, 2.0))]
    results.append(not_ok(Status.wrong, "12 weights differ", "cuda_fp16", sample=3))
    results[-1].metrics = {"load/total_s": 0.001}
    (row,) = rows(sweep_as_markdown(results, VARYING))
    ok = sorted(found.metrics["load/total_s"] for found in results[:3])
    least, median, largest = map(format_seconds, ok)
    assert row[2:5] == ["3", median, f"{least}–{largest}"] and row[-1] == "3 ok, 1 wrong"


def test_every_status_is_counted_and_said_why() -> None:
    """What did not run is listed with its reason: silence would look like a complete comparison."""
    text = sweep_as_markdown(list(sweep_results(5)), VARYING)
    assert "4 ok, 1 oom" in text
    assert "- not ok: cold · cpu_then_move: 1 oom: CUDA out of memory: 14.2 GiB wanted, 11.0 GiB free" in text
    assert "5 skipped: max_memory of 20 GiB on device 0" in text
    assert "not ok" in drawn(list(sweep_results(2)), VARYING)


def test_the_interval_says_how_much_it_promises() -> None:
    """That of five samples covers the true median with 93.8 %, of one with nothing; `compare` says the same."""
    five = [result(sample=i) for i in range(5)]
    text = sweep_as_markdown(five, VARYING)
    said = "The interval covers the true median with a probability of 93.8 % (n = 5)."
    assert said in text and said in as_markdown(compare_points(five, VARYING))
    assert "One sample per configuration says nothing about the spread" in sweep_as_markdown(five[:1], VARYING)


def test_samples_of_several_machines_have_a_table_too() -> None:
    """A launcher may run the jobs of a sweep anywhere: the table at its end says where, and is never refused."""
    near, far = result(sample=0), result(sample=1)
    for measured, cpu in ((near, "EPYC 9454"), (far, "Xeon 8480")):
        measured.environment = {"cpu": {"model": cpu, "available": 16}}
    found = rows(sweep_as_markdown([near, far], VARYING))
    assert len(found) == 2 and {row[3] for row in found} == {"1"}
    assert "EPYC 9454" in found[0][2] + found[1][2] and "Xeon 8480" in found[0][2] + found[1][2]


def test_memory_is_the_gpus_where_there_is_one() -> None:
    """On a machine without a GPU the host's memory is what a method costs."""
    on_gpu, on_cpu = result(), result()
    on_cpu.metrics = {key: value for key, value in on_cpu.metrics.items() if "gpu" not in key}
    assert "GPU GiB" in sweep_as_markdown([on_gpu], VARYING)
    assert "host GiB" in sweep_as_markdown([on_cpu], VARYING)
    assert "GPU" not in sweep_as_markdown([on_cpu], VARYING)


def test_the_cold_start_is_shown_where_it_was_measured() -> None:
    """Prewarmed processes have imported everything before: their start says nothing about a cold one."""
    assert "start to token s" not in sweep_as_markdown([result()], VARYING)
    assert "start to token s" in sweep_as_markdown([result(fresh=True)], VARYING)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_figure_is_broken_in_a_narrow_terminal(width: int) -> None:
    """A figure over two lines reads as two figures."""
    text = drawn(list(sweep_results(5)), VARYING, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for figure in ("465.2", "453.6–467.7", "4.527", "14.19", "0.160"):
        assert figure in text


def test_odd_characters_break_neither_table() -> None:
    """Reasons quote whatever a library said, markup and pipes included."""
    odd = not_ok(Status.failed, "shape [4|8] is [bold]wrong[/bold]\nsecond line", "cuda_fp16")
    assert "shape [4|8] is [bold]wrong[/bold] second line" in drawn([odd], VARYING, 200)
    markdown = sweep_as_markdown([odd], VARYING)
    assert "shape [4\\|8]" in markdown
    assert "No sample is ok" in markdown


def test_a_single_run_has_a_table_too() -> None:
    """Outside a sweep nothing varies: the table names model and cache in its title."""
    assert "Load times · model qwen2.5-7b-shape · cache warm" in sweep_as_markdown([result()], [])
    assert rows(sweep_as_markdown([result()], []))[0][:2] == ["all", "1"]
    assert "nothing to compare" in drawn([], VARYING)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loading", "cuda_fp16"),
        ("cache", "warm"),
        ("validation", "placement"),
        ("process", "prewarmed"),
        ("model", "qwen2.5-7b-shape"),
        ("loading.dtype", "float16"),
        ("loading.max_memory", "{}"),
        ("loading.disable_cpu_offload", "true"),
        ("runtime", "fast"),
        ("inference.new_tokens", "32"),
        ("model.architecture", '{"hidden_size": 3584, "num_hidden_layers": 28}'),
        ("extra.key", "7"),
        ("nowhere", ""),
    ],
)
def test_what_varied_is_read_back_as_it_was_typed(key: str, value: str) -> None:
    """Table, params and names show the option that was chosen, not the structure behind it."""
    measured = result()
    measured.identity.overrides.extend(["runtime=fast", "+extra.key=7"])
    assert value_of(measured, key) == value


def test_the_sample_is_no_property_of_a_point() -> None:
    """Repetitions of a point are one line of the table."""
    assert varying_values(result(sample=3), ["loading", "sample"]) == {"loading": "cuda_fp16"}


def test_gathering_survives_a_damaged_file(tmp_path: Path) -> None:
    """A disk that filled up in the middle of one result must not hide the others."""
    for measured in (result(job=1, sample=1), result(job=0)):
        write_sample(tmp_path / str(measured.identity.job), measured)
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "result.json").write_text('{"schema_version": 1, "status"')
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "result.json").write_text('{"schema_version": 99}')
    gathered = gather_results(tmp_path)
    assert [found.identity.job for found in gathered.results] == [0, 1]
    assert list(gathered.unreadable) == [tmp_path / "2" / "result.json", tmp_path / "3" / "result.json"]
    assert any("schema version 99" in problem for problem in gathered.problems)


def test_copies_in_the_store_are_not_counted_again(tmp_path: Path) -> None:
    """Reading a whole outputs folder finds each sample once, though MLflow keeps a copy of its file."""
    write_sample(tmp_path / "sweeps" / "one" / "0", result())
    write_sample(tmp_path / "artifacts" / ("0a" * 16) / "artifacts", result())
    assert len(gather_results(tmp_path).results) == 1


def test_gathering_what_is_no_folder_says_so(tmp_path: Path) -> None:
    """A mistyped path is named."""
    with pytest.raises(LadezeitError, match="is not a folder"):
        gather_results(tmp_path / "missing")


def test_the_share_of_the_ceiling_is_shown_where_it_is_known() -> None:
    """The median of the ok samples; tiny shares keep a digit, and nothing is cut at 100 %."""
    assert "of ceiling" not in sweep_as_markdown(list(sweep_results(5)), VARYING)
    shares = {"cuda_fp16": (0.2, 0.7, 0.634), "legacy_manager": (0.0312,), "device_map_auto": (1.037,), "other": ()}
    results = [result(loading, sample=i) for loading, found in shares.items() for i in range(max(1, len(found)))]
    for measured in results:
        found = shares[measured.config["loading"]["name"]]
        if found:
            measured.metrics["load/ceiling_share"] = found[measured.identity.sample]
    text = sweep_as_markdown(results, VARYING)
    assert "| of ceiling |" in text
    for cell in ("| 63 % |", "| 3.1 % |", "| 104 % |"):
        assert cell in text
    for width in (80, 120):
        assert "104 %" in drawn(results, VARYING, width)
