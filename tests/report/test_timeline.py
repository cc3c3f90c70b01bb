"""The picture of where a sample's time went."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from example_results import not_ok, result
from ladezeit.report.timeline import _panels, _title, draw_timeline
from ladezeit.results.records import Phase, Status

LOAD_BLUE = (0x00, 0x72, 0xB2)


def blue_pixels(path: Path) -> int:
    with Image.open(path) as picture:
        raw = picture.convert("RGB").tobytes()
    return sum(raw[i : i + 3] == bytes(LOAD_BLUE) for i in range(0, len(raw), 3))


def test_the_load_is_drawn_to_scale(tmp_path: Path) -> None:
    """Half of a sample spent loading looks like half of it."""
    measured = result()
    for share in (0.2, 0.8):
        measured.phases = [Phase("load", 0.0, share, share), Phase("validation", share, 1 - share, 1 - share)]
        draw_timeline(measured, tmp_path / f"{share}.png")
    assert blue_pixels(tmp_path / "0.8.png") == pytest.approx(4 * blue_pixels(tmp_path / "0.2.png"), rel=0.1)


def test_sample_and_load_have_a_panel_each() -> None:
    """A load of 0.1 s would be invisible beside an import of 5 s: its phases are drawn on their own scale."""
    (outer, outside), (inner, inside) = _panels(result(fresh=True, factor=0.02).phases)
    assert (outer, inner) == ("whole sample", "inside the load")
    assert [row.name for row in outside][:4] == ["process_start", "import", "cuda_context", "cache_check"]
    assert [row.name for row in inside] == ["config", "skeleton", "read", "finalise", "touch", "unattributed"]
    assert inside[0].spans[0][0] == 0.0, "the panel begins where the load does"


def test_repeated_and_nested_phases_share_a_row() -> None:
    """Eight shards are one line with eight bars, indented below what they belong to; nothing unattributed is no row."""
    shards = [Phase("load/read/shard", 1 + i, 0.5, 0.5) for i in range(8)]
    load = [Phase("load/read", 1, 8, 4), Phase("load", 1, 8, 0)]
    _, (_, rows) = _panels([*shards, *load])
    assert [(row.name, row.depth) for row in rows] == [("read", 0), ("shard ×8", 1)]
    assert rows[1].total_s == 4.0
    assert len(rows[1].spans) == 8


def test_very_many_phases_stay_one_picture(tmp_path: Path) -> None:
    """A custom engine may record hundreds of phases; the short ones share a row."""
    measured = result()
    measured.phases += [Phase(f"load/layer_{i}", 1 + i / 100, 0.01 + i / 1e6, 0.01) for i in range(300)]
    draw_timeline(measured, tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as picture:
        assert picture.height < 1500
    _, (_, rows) = _panels(measured.phases)
    assert any(row.name.endswith("shorter phases") for row in rows)


@pytest.mark.parametrize("status", [Status.oom, Status.skipped])
def test_a_sample_that_is_not_ok_has_a_picture_too(tmp_path: Path, status: Status) -> None:
    """How far it came, or why it never started, instead of a missing file."""
    measured = not_ok(status, "max_memory of 20 GiB: this GPU has 16 GiB", label="cold·auto·#1")
    draw_timeline(measured, tmp_path / "timeline.png")
    assert _title(measured) == f"qwen2.5-7b-shape · cold·auto·#1 · {status.value}"
    with Image.open(tmp_path / "timeline.png") as picture:
        assert picture.width == 900


def test_drawing_leaves_no_global_state_behind(tmp_path: Path) -> None:
    """It runs inside a sweep, beside whatever else draws: no pyplot, no backend chosen, no figure kept."""
    before = "matplotlib.pyplot" in sys.modules
    draw_timeline(result(), tmp_path / "timeline.png")
    assert ("matplotlib.pyplot" in sys.modules) is before


def test_the_title_names_model_run_and_load() -> None:
    """A picture that was saved elsewhere still says what it shows."""
    measured = result(label="warm·cuda_fp16·#0", factor=1.0)
    assert _title(measured) == "qwen2.5-7b-shape · warm·cuda_fp16·#0 · load 4.483 s"
