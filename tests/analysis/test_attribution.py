"""Where the time goes that one method spends and another does not, in words that are true."""

import pytest

import planted
from ladezeit.analysis.decision import decide_methods
from ladezeit.report.verdict import closing_words, summarize_sweep
from ladezeit.results.records import Phase, Result

WALK_S = 0.1


def with_a_short_walk(samples: int) -> list[Result]:
    """Two methods that nobody can tell apart, one of which does a little more."""
    made = planted.sweep(samples, {"transformers": 1.0, "manager": 1.0}, bad=False)
    for result in made:
        if result.config["loading"]["name"] == "manager":
            result.phases.append(Phase("load/module_walk", 0.5, WALK_S, WALK_S))
    return made


def test_the_origin_case_is_explained_in_the_closing_words() -> None:
    """What the whole tool is for: the settings were optimal, the manager's walk over all modules was the cost."""
    found = planted.sweep(5, {"transformers": 1.0, "legacy_manager": 1.0}, bad=False)
    said = " ".join(closing_words(found, ["loading", "sample"]))
    assert "load with `transformers`" in said.lower()
    assert "more in load/module_walk, which transformers does not have" in said
    assert "the settings are not the cause" in said


@pytest.mark.parametrize("samples", [1, 3, 5])
def test_work_that_only_one_does_is_named_even_where_it_is_lost_in_the_noise(samples: int) -> None:
    """The manager's walk costs what it costs, also where nothing can be told apart or samples are too few."""
    made = with_a_short_walk(samples)
    (decision,), _ = decide_methods(made, ["loading"])
    assert decision.additions == ["manager has all phases of transformers, plus: load/module_walk (0.100 s)."]
    assert decision.additions[0] in summarize_sweep(made, ["loading", "sample"])


def test_what_ends_elsewhere_does_more_for_another_reason() -> None:
    """A cast that another dtype needs is no needless work: points that end alike are compared, others are not."""
    made = with_a_short_walk(5)
    for result in made:
        if result.config["loading"]["name"] == "manager":
            result.effective["dtype"] = "float32"
    (decision,), _ = decide_methods(made, ["loading"])
    assert decision.additions == []


def test_nothing_is_said_twice() -> None:
    """What the attribution of a slower method names already is not named again."""
    (decision,), _ = decide_methods(
        planted.sweep(5, {"transformers": 1.0, "legacy_manager": 1.0}, bad=False), ["loading"]
    )
    assert decision.attributions and decision.additions == []


def test_samples_that_cannot_be_compared_end_in_words_too() -> None:
    """A sweep's end never breaks: where there is no verdict, it says why."""
    made = planted.sweep(1, bad=False)
    made[0].environment = {**made[0].environment, "cpu": {"model": "another", "available": 2}}
    (said,) = closing_words(made, ["loading"])
    assert said.startswith("There is no verdict: ") and "different machines" in said
