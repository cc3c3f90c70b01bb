"""Run names: short enough for MLflow's lists, different for every sample, what differs first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladezeit.results.labels import LIMIT, make_label, make_labels

KEYS = st.sampled_from(["cache", "cache.state", "loading", "loading.dtype", "validation", "model", "sample"])
WORDS = st.lists(st.sampled_from(["device", "map", "auto", "max", "memory", "cpu"]), min_size=1, max_size=6)
VALUES = WORDS.map("_".join) | st.text(max_size=30)
POINTS = st.dictionaries(KEYS, VALUES, max_size=7)
SAMPLES = st.integers(0, 999)


@pytest.mark.parametrize(
    ("values", "sample", "name"),
    [
        ({"loading": "streamed", "cache": "cold"}, 2, "cold·streamed·#2"),
        ({"validation": "none", "loading": "auto", "cache": "warm"}, 0, "warm·auto·none·#0"),
        ({"cache": "cold", "loading": "device_map_auto_max_memory"}, 2, "cold·dmam_memory·#2"),
        ({"loading": "device_map_auto_max_memory"}, 2, "dma_max_memory·#2"),
        ({"loading": "cpu_then_move", "cache": "cold", "sample": "3"}, 3, "cold·c_then_move·#3"),
        ({"model": "/data/models/qwen"}, 0, "/data/models/qwen·#0"),
        ({}, 4, "#4"),
    ],
)
def test_what_differs_comes_first_and_stays_readable(values: dict[str, str], sample: int, name: str) -> None:
    """A person tells runs apart by the first characters: cache state, then loading method, then the rest."""
    assert make_label(values, sample) == name


@given(POINTS, SAMPLES, st.integers(12, 40))
def test_no_label_is_longer_than_the_lists_show(values: dict[str, str], sample: int, limit: int) -> None:
    """MLflow cuts longer names at the end, where the sample's number stands."""
    name = make_label(values, sample, limit)
    assert len(name) <= limit
    assert name.endswith(f"#{sample}")
    assert name.isprintable()


@given(st.lists(st.tuples(POINTS, SAMPLES), max_size=25))
def test_all_labels_of_a_sweep_differ(points: list[tuple[dict[str, str], int]]) -> None:
    """Two bars with the same name in a chart cannot be told apart, whatever the values are."""
    names = make_labels(points)
    assert len(names) == len(points)
    assert len(set(names)) == len(names)
    assert all(len(name) <= LIMIT for name in names)


@given(st.lists(st.tuples(POINTS, SAMPLES), min_size=1, max_size=10))
def test_labels_are_the_same_every_time(points: list[tuple[dict[str, str], int]]) -> None:
    """A sweep that is continued in another process gives its samples the same names."""
    assert make_labels(points) == make_labels(points)


def test_points_that_shorten_to_the_same_name_get_a_digest() -> None:
    """`device_map…` and `drive_map…` shorten alike; each keeps one digest over all its samples."""
    values = [
        {"cache": "cold", "loading": name} for name in ("device_map_auto_max_memory", "drive_map_auto_max_memory")
    ]
    names = make_labels([(value, sample) for sample in range(2) for value in values])
    assert [name[-2:] for name in names] == ["#0", "#0", "#1", "#1"]
    assert names[0][:-1] == names[2][:-1]
    assert names[0] != names[1]


def test_a_whole_sweep_of_real_methods_is_readable() -> None:
    """The names of the origin case's methods all fit and differ without digests."""
    methods = "transformers,cuda_fp16,device_map_auto,device_map_auto_max_memory,cpu_then_move,single_device_map"
    points = [
        ({"cache": cache, "loading": method}, sample)
        for sample in range(5)
        for cache in ("cold", "warm")
        for method in (*methods.split(","), "legacy_manager")
    ]
    names = make_labels(points)
    assert len(set(names)) == 70
    assert not [name for name in names if "~" in name]
