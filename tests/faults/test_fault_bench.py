"""Every engine, every fault, every level: what a level promises is found and named, and no right load is accused."""

import json
from pathlib import Path

import peers
import pytest
import tables
from bench import ENGINES, Bench, Outcome, one_thread, refused_here
from file_faults import IN_FILES
from planting import IN_MEMORY

from ladezeit.config import ValidationLevel
from ladezeit.validation.faults import WORDS, Fault
from ladezeit.validation.levels import CLAIMS

pytestmark = pytest.mark.slow
#: A forward says that something is wrong; it cannot say where.
NAMING = [level for level in ValidationLevel if level is not ValidationLevel.logits]


@pytest.fixture(scope="module")
def bench(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if refused := refused_here():
        pytest.skip(f"the bench is of all engines: {refused}")
    return Bench(cache, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def outcomes(bench: Bench) -> list[Outcome]:
    return bench.run()


def test_every_fault_can_be_planted_and_has_words() -> None:
    """A fault that nothing plants would be counted as found by everybody."""
    assert set(Fault) == set(WORDS) == set(IN_FILES) | set(IN_MEMORY)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_right_load_is_accused_by_no_level(engine: str, bench: Bench) -> None:
    """No false alarm: what is found below is the fault's doing."""
    with one_thread():
        assert [one for one in bench.outcomes(engine, None) if one.found] == []


@pytest.mark.parametrize("level", [ValidationLevel.full, ValidationLevel.content])
def test_nothing_gets_past_the_whole_proof(level: ValidationLevel, outcomes: list[Outcome]) -> None:
    """A user whose model is proven has none of these faults; otherwise the weight or file is named."""
    asked = [one for one in outcomes if one.level is level]
    assert {one.fault for one in asked} == set(Fault)
    assert {one.engine for one in asked} == set(ENGINES)
    assert [one for one in asked if not (one.found and one.named)] == []


@pytest.mark.parametrize("level", list(ValidationLevel))
def test_a_level_finds_what_it_claims(level: ValidationLevel, outcomes: list[Outcome]) -> None:
    """The promises in the documentation's table are kept with every engine."""
    claimed = [one for one in outcomes if one.level is level and one.fault in CLAIMS[level]]
    assert [one for one in claimed if not one.found] == []


@pytest.mark.parametrize("level", NAMING)
def test_whatever_is_found_is_named(level: ValidationLevel, outcomes: list[Outcome]) -> None:
    """Somebody who has to mend it is told the weight or the file."""
    found = [one for one in outcomes if one.level is level and one.found]
    assert [one for one in found if not one.named] == []


def test_the_data_of_the_report_is_what_the_bench_finds(outcomes: list[Outcome]) -> None:
    """What the report says of a level is measured: `python tests/faults/make_tables.py` writes it anew."""
    assert json.loads(tables.CATCHES.read_text()) == tables.catches(outcomes)


def test_the_tables_of_the_documentation_are_what_was_found() -> None:
    """docs/verification.md cannot be edited into saying more than was found."""
    caught, noticed = (json.loads(path.read_text()) for path in (tables.CATCHES, tables.PEERS))
    document = tables.DOCUMENT.read_text()
    assert tables.rendered(document, caught, noticed, tables.costs()) == document
    assert "BROKEN" not in document


@pytest.mark.parametrize("name", peers.PEERS)
def test_the_libraries_notice_what_the_documentation_says(name: str, bench: Bench, tmp_path: Path) -> None:
    """What is said of others is true of the versions that are installed."""
    known = json.loads(tables.PEERS.read_text())
    if known["versions"] != peers.versions():
        pytest.skip("other versions are installed than those that the documentation speaks of")
    words = {fault: one["noticed"] for fault, one in peers.noticed(name, bench.checkpoint, tmp_path).items()}
    assert words == {fault: one["noticed"] for fault, one in known["noticed"][name].items()}


@pytest.mark.gpu
def test_silent_offload_from_a_gpu_is_found(cache: Path, tmp_path: Path) -> None:
    """A layer that went to host memory is found by `placement` and everything above it."""
    for one in Bench(cache, tmp_path, "cuda:0").outcomes("transformers", Fault.silent_offload):
        assert one.found == (Fault.silent_offload in CLAIMS[one.level]), one
