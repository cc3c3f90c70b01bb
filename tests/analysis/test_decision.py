"""The verdict on planted truths: the winner named, equals equal, the slow one quantified, the wrong one left out."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import example_results as example
import planted
from ladezeit.analysis import profile_writer
from ladezeit.analysis.comparison import compare_points
from ladezeit.analysis.decision import Decision, decide_methods
from ladezeit.analysis.recommendations import recommend_steps
from ladezeit.analysis.standing import State
from ladezeit.errors import LadezeitError
from ladezeit.report.verdict import as_markdown, describe_answer
from ladezeit.results.records import Result, Status

VARYING = ["loading", "validation"]


def decision(results: list[Result], **arguments: list[tuple[str, str]]) -> Decision:
    (only,), _ = decide_methods(results, VARYING, **arguments)
    return only


def names(points: list) -> set[str]:
    return {point.values["loading"] for point in points}


def test_equal_methods_share_the_first_place_and_the_slow_one_does_not() -> None:
    found = decision(planted.sweep())
    assert found.load.state is State.shared
    assert names(found.load.best) == {"cuda_fp16", "single_device_map", "transformers"}
    assert names(found.load.others) == {"slow"}


def test_a_clear_winner_is_named() -> None:
    found = decision(planted.sweep(truth={"cuda_fp16": 0.7, "transformers": 1.0, "slow": 1.5}))
    assert found.load.state is State.best and names(found.load.best) == {"cuda_fp16"}
    assert "`cuda_fp16`" in describe_answer(found) and "significantly faster" in describe_answer(found)


def test_the_slow_one_is_quantified_within_its_interval() -> None:
    """The planted factor is 1.5: the interval of the ratio holds it, and the cost in seconds is right."""
    found = decision(planted.sweep(samples=10), current=[("loading", "slow")])
    assert found.current is not None and found.current.optimal is False
    assert found.current.ratio is not None and found.current.cost_s is not None
    assert found.current.ratio.interval.low <= 1.5 <= found.current.ratio.interval.high
    assert found.current.cost_s == pytest.approx(0.5 * 4.46, rel=0.1)
    assert recommend_steps(found, [found])[0].gain_s == found.current.cost_s


def test_wrong_failing_and_unproven_methods_are_never_ranked() -> None:
    """All three are faster than everything that is right."""
    found = decision(planted.sweep())
    reasons = {point.values["loading"]: point.excluded or "" for point in found.apart}
    assert set(reasons) == {"offloader", "broken", "unchecked"}
    assert "5 of 5 wrong: 2 of 339 tensors lie on the CPU" in reasons["offloader"]
    assert "5 of 5 failed: no kernel image" in reasons["broken"]
    assert "the verification did not run" in reasons["unchecked"]


def test_what_is_proven_of_a_quantized_model_is_said_with_the_verdict() -> None:
    """A fast quantised load is not taken for the same model: the claim of its proof stands beside its place."""
    made = planted.sweep(bad=False)
    for result in made:
        if result.config["loading"]["name"] == "slow" and result.proof is not None:
            result.proof["claim"] = "the codes are those that the library makes of the checkpoint's"
    said = as_markdown([decision(made)], [], "")
    assert said.count("- What was verified of `slow`: the codes are those that the library makes") == 1


def test_a_method_that_was_wrong_once_is_out() -> None:
    made = planted.sweep(bad=False)
    bad = next(r for r in made if r.config["loading"]["name"] == "cuda_fp16")
    bad.status, bad.reason = Status.wrong, "one tensor on meta"
    found = decision(made)
    assert names(found.apart) == {"cuda_fp16"} and "1 of 5 wrong" in (found.apart[0].excluded or "")


def test_a_weaker_validation_is_no_proof() -> None:
    made = planted.sweep(bad=False)
    for result in made:
        if result.config["loading"]["name"] == "cuda_fp16":
            assert result.proof is not None
            result.proof["level"] = "sampled"
    found = decision(made)
    assert "validation=sampled does not check" in (found.apart[0].excluded or "")


def test_a_method_that_fails_now_and_then_is_ranked_and_told_on() -> None:
    made = planted.sweep(samples=6, bad=False)
    gone = next(index for index, r in enumerate(made) if r.config["loading"]["name"] == "slow")
    made[gone] = example.not_ok(Status.oom, "out of memory", "slow", cache="warm", sample=0)
    found = decision(made)
    assert names(found.failing) == {"slow"}
    assert "1 oom: out of memory" in as_markdown([found], [], "")


def test_the_current_config_is_optimal_or_as_good_as_can_be_told() -> None:
    found = decision(planted.sweep())
    assert found.current is not None and found.current.optimal is True
    assert "already optimal as far as can be told" in as_markdown([found], [], "")
    best = decision(planted.sweep(truth={"transformers": 0.5, "slow": 1.5}))
    assert "is the best one: nothing to change" in as_markdown([best], [], "")


def test_the_origins_case_is_found_in_the_manager_and_not_in_the_settings() -> None:
    """170 of 175 s are the walk over all modules, with the settings of the fast method."""
    truth = {"cuda_fp16": 1.0, "transformers": 1.0, "legacy_manager": 1.0}
    found = decision(planted.sweep(truth=truth, bad=False), current=[("loading", "legacy_manager")])
    text = as_markdown([found], [], "")
    assert "are spent in load/module_walk" in text and "the settings are not the cause" in text
    assert "(97 %)" in text and "costs 170" in text
    assert "remove load/module_walk from it" in recommend_steps(found, [found])[1].text


def test_too_few_samples_are_not_called_equality() -> None:
    """Eight methods need six samples: with five nobody reads that 0.5 s and 24 s cannot be told apart."""
    truth = {f"method_{number}": 1.0 for number in range(7)} | {"slow": 45.0}
    said = describe_answer(decision(planted.sweep(5, truth, bad=False)))
    assert said.startswith("undecided: 8 methods need at least 6 samples each to be told apart, and there are 5.")
    assert "are not distinguishable" in describe_answer(decision(planted.sweep(6, truth, bad=False)))


def test_settings_that_differ_are_named_as_a_possible_cause() -> None:
    made = [planted.sample("cuda_fp16", n, 1.0, job=n) for n in range(5)]
    made += [planted.sample("slow", n, 2.0, job=5 + n, dtype="float32") for n in range(5)]
    assert "dtype: float32 / float16" in as_markdown([decision(made)], [], "")


def test_a_value_that_says_nothing_alone_is_named_with_its_key() -> None:
    made = [planted.sample("cuda_fp16", n, 1.0, job=n) for n in range(10)]
    for index, result in enumerate(made):
        result.config["phases"] = bool(index % 2)
        result.identity = type(result.identity)(**{**result.identity.__dict__, "point": f"p{index % 2}"})
    (only,), _ = decide_methods(made, ["phases"])
    assert {point.name for point in only.load.best} == {"phases=true", "phases=false"}


def test_points_that_look_alike_are_told_apart_by_their_sweep() -> None:
    """A sweep of an older version has other ids for the same options: two rows, and each says where it is from."""
    made = planted.sweep(truth={"cuda_fp16": 1.0}, bad=False)
    for number in range(5):
        older = planted.sample("cuda_fp16", number, 1.2, job=number, sweep="older")
        older.identity = type(older.identity)(**{**older.identity.__dict__, "point": "older-id"})
        made.append(older)
    ranked = compare_points(made, ["loading"]).sections[0].ranked
    assert [point.name for point in ranked] == ["sweep=2026-03-01_origin", "older"]


def test_nine_methods_need_more_than_five_samples_and_that_is_said() -> None:
    found = decision(planted.sweep(truth={f"m{i}": 1.0 + 0.3 * i for i in range(9)}, bad=False))
    assert found.load.state is State.shared
    assert "9 methods cannot be told apart with fewer than 6 samples each" in as_markdown([found], [], "")


def test_too_few_samples_decide_nothing() -> None:
    found = decision(planted.sweep(samples=3, truth={"cuda_fp16": 0.1, "transformers": 1.0}, bad=False))
    assert found.load.state is State.too_few and "undecided" in describe_answer(found)
    assert "sample=range(5)" in recommend_steps(found, [found])[0].text
    with pytest.raises(LadezeitError, match="no decision to write"):
        profile_writer.entries_of([found]) or profile_writer.write_profile(Path("/nowhere/p.yaml"), [found])


def test_one_sample_and_all_failed_are_answers_too() -> None:
    assert "fewer than 5" in describe_answer(decision([planted.sample("cuda_fp16", 0, 1.0)]))
    broken = decision([planted.failed("broken", number, number) for number in range(5)])
    assert broken.load.state is State.absent and "no method has a verified sample" in describe_answer(broken)
    assert "5 of 5 failed" in as_markdown([broken], [], "")


def test_an_open_question_says_how_many_samples_settle_it() -> None:
    made = [planted.sample("cuda_fp16", n, 1.0, job=n, noise=0.1) for n in range(6)]
    made += [planted.sample("transformers", n, 1.15, job=6 + n, noise=0.1) for n in range(6)]
    found = decision(made)
    assert found.load.state is State.shared
    (question,) = found.load.questions
    assert question.samples is not None and 6 < question.samples <= 100
    said = f"not distinguishable (+12.8 %); about {question.samples} samples each would settle it"
    assert said in as_markdown([found], [], "")


def test_an_open_question_that_no_hundred_samples_settle_says_so() -> None:
    made = [planted.sample("cuda_fp16", n, 1.0, job=n, noise=0.1) for n in range(6)]
    made += [planted.sample("transformers", n, 1.06, job=6 + n, noise=0.1) for n in range(6)]
    found = decision(made)
    assert [question.samples for question in found.load.questions] == [None]
    assert "not distinguishable (+4.0 %); more than 100 samples would be needed" in as_markdown([found], [], "")


def test_the_warm_cache_is_advised_where_it_was_measured() -> None:
    made = [planted.sample("cuda_fp16", n, 1.0, job=n) for n in range(5)]
    made += [planted.sample("cuda_fp16", n, 2.6, job=5 + n, cache="cold") for n in range(5)]
    decisions, _ = decide_methods(made, ["cache", "loading"])
    cold = next(d for d in decisions if d.conditions["cache"] == "cold")
    assert "Keep the checkpoint in the page cache" in recommend_steps(cold, decisions)[0].text


def test_objectives_that_disagree_give_a_pareto_front() -> None:
    made = planted.sweep(truth={"cuda_fp16": 1.0, "frugal": 1.3, "slow": 2.0}, bad=False)
    for result in made:
        frugal = result.config["loading"]["name"] == "frugal"
        noise = 1e-6 * result.identity.sample
        result.metrics["memory/gpu_allocated_peak_gib"] = (14.2 if frugal else 28.4) + noise
        result.metrics["memory/host_peak_rss_gib"] = 3.0
    found = decision(made)
    assert not found.best_at_all and names(found.pareto) == {"cuda_fp16", "frugal"}
    assert "No method is best at everything" in as_markdown([found], [], "")


def test_machines_are_not_compared_unless_asked() -> None:
    made = planted.sweep(bad=False)
    for result in made[::2]:
        result.environment = {**planted.MACHINE, "device": {"name": "cuda:0", "gpu": {"name": "NVIDIA A100"}}}
    with pytest.raises(LadezeitError, match=r"gpu: NVIDIA A100 / NVIDIA H100 80GB HBM3.*--across-machines"):
        decide_methods(made, VARYING)
    compared = compare_points(made, VARYING, across_machines=True)
    assert {point.values["machine"].split(" ·")[0] for point in compared.sections[0].ranked} == {
        "NVIDIA A100",
        "NVIDIA H100 80GB HBM3",
    }


def test_versions_that_differ_are_noted() -> None:
    made = planted.sweep(bad=False)
    made[0].environment = {**planted.MACHINE, "libraries": {"torch": "2.13.0"}}
    _, notes = decide_methods(made, VARYING)
    assert any("torch" in note and "2.13.0" in note for note in notes)


def test_a_current_config_that_nobody_measured_is_an_error() -> None:
    with pytest.raises(LadezeitError, match="no sample is of the current config loading=nonsense"):
        decision(planted.sweep(), current=[("loading", "nonsense")])


def test_the_profile_says_what_to_use_and_what_that_rests_on(tmp_path: Path) -> None:
    found = decision(planted.sweep(truth={"cuda_fp16": 0.7, "legacy_manager": 0.6, "slow": 1.5}, bad=False))
    path = tmp_path / "profile.yaml"
    assert profile_writer.write_profile(path, [found]) == ["qwen2.5-7b-shape"]
    (entry,) = profile_writer.read_profile(path)["qwen2.5-7b-shape"]
    assert entry["overrides"] == ["loading=cuda_fp16"] and entry["loading"]["engine"] == "transformers"
    assert entry["dtype"] == "float16" and entry["device"] == "cuda:0"
    assert entry["evidence"]["n"] == 5 and entry["evidence"]["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"


def test_the_origins_form_is_keyed_by_model(tmp_path: Path) -> None:
    import json

    path = tmp_path / "performance.json"
    profile_writer.write_profile(path, [decision(planted.sweep(truth={"cuda_fp16": 0.7, "slow": 1.5}, bad=False))])
    wanted = {"device_map": "cuda", "torch_dtype": "float16", "disable_cpu_offload": True}
    assert json.loads(path.read_text()) == {"qwen2.5-7b-shape": {"loading": wanted}}


@pytest.mark.parametrize("form", ["profile.yaml", "performance.json"])
def test_what_the_verdict_writes_is_how_a_program_loads(form: str, tmp_path: Path) -> None:
    """From the sweep to `ladezeit.load(model, profile=…)` nobody types a setting again."""
    from ladezeit.config import DType, FolderModel, TransformersLoading
    from ladezeit.config.loading_profile import Profile

    path = tmp_path / form
    profile_writer.write_profile(path, [decision(planted.sweep(truth={"cuda_fp16": 0.7, "slow": 1.5}, bad=False))])
    method = Profile.open(path).method_for(FolderModel(name="qwen2.5-7b-shape", path="/data"), "cuda:0").loading
    assert isinstance(method, TransformersLoading)
    assert (method.device_map, method.dtype, method.disable_cpu_offload) in (
        ("device", DType.float16, True),
        ("cuda", DType.float16, True),
    )


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text("models: {}\n")
    with pytest.raises(LadezeitError, match="no loading profile"):
        profile_writer.read_profile(path)


def test_a_current_config_that_loads_the_wrong_thing_is_told_on() -> None:
    found = decision(planted.sweep(), current=[("loading", "offloader")])
    assert found.current is None and found.current_apart is not None
    assert "`offloader`, **is not ranked**: 5 of 5 wrong" in as_markdown([found], [], "")


def test_the_cold_start_is_an_objective_and_imports_are_a_step() -> None:
    """In a fresh process 5.1 s go into imports: more than any loading method could save."""
    made = [planted.sample("cuda_fp16", n, 1.0, job=n, fresh=True) for n in range(5)]
    made += [planted.sample("slow", n, 1.5, job=5 + n, fresh=True) for n in range(5)]
    found = decision(made)
    cold_start = next(standing for standing in found.standings if standing.objective.name == "cold_start")
    assert cold_start.state is State.best and names(cold_start.best) == {"cuda_fp16"}
    assert "Import the libraries before" in recommend_steps(found, [found])[0].text
    assert recommend_steps(found, [found])[0].gain_s == pytest.approx(5.1)


def test_a_collector_that_walks_through_a_load_is_a_step() -> None:
    """Half of a load may go into the interpreter's garbage collector: one line in the service gets it back."""
    made = [planted.sample("cuda_fp16", n, 1.0, job=n) for n in range(5)]
    made += [planted.sample("slow", n, 1.5, job=5 + n) for n in range(5)]
    assert not any("gc.freeze" in step.text for step in recommend_steps(decision(made), []))
    for result in made:
        result.metrics["load/garbage_collection_share"] = 0.4
    found = decision(made)
    assert found.load.leader is not None and found.load.leader.spread is not None
    step = next(step for step in recommend_steps(found, []) if "gc.freeze" in step.text)
    assert step.gain_s == pytest.approx(0.4 * found.load.leader.spread.median) and "cuda_fp16" in step.text


def test_blocks_that_drift_leave_a_hint_and_no_winner() -> None:
    """The machine slows down fivefold: the primary test sees nothing, the pairs of a block do, and it is said."""
    made = []
    for number in range(8):
        made.append(planted.sample("cuda_fp16", number, 1.0 + 0.5 * number, job=2 * number, noise=0.001))
        made.append(
            planted.sample("transformers", number, 1.05 * (1.0 + 0.5 * number), job=2 * number + 1, noise=0.001)
        )
    found = decision(made)
    assert found.load.state is State.shared
    assert "Block by block they do differ, p = 0.008" in as_markdown([found], [], "")


def test_a_change_of_dtype_comes_with_a_warning() -> None:
    made = [planted.sample("cuda_fp16", n, 1.0, job=n) for n in range(5)]
    made += [planted.sample("transformers", n, 2.0, job=5 + n, dtype="bfloat16") for n in range(5)]
    found = decision(made)
    assert "mind that it ends with float16, not bfloat16" in recommend_steps(found, [found])[0].text
    entries = profile_writer.entries_of([found])
    assert [(e["dtype"], e["evidence"]["best_of_all_dtypes"]) for e in entries] == [
        ("float16", True),
        ("bfloat16", False),
    ]


def test_quantized_weights_are_other_weights() -> None:
    """4 bit beats float16: the verdict warns, names the difference, and the profile keeps the two apart."""
    made = [planted.sample("transformers", n, 1.0, job=n) for n in range(5)]
    made += [planted.sample("bitsandbytes_4bit", n, 0.5, job=5 + n) for n in range(5)]
    for result in made[5:]:
        result.config["loading"]["engine"] = "bitsandbytes_4bit"
        result.effective["quantisation"] = {"bits": 4}
    found = decision(made)
    assert "ends with float16, bitsandbytes_4bit, not float16" in recommend_steps(found, [found])[0].text
    assert "the settings are not the cause" not in as_markdown([found], [], "")
    assert [entry["dtype"] for entry in profile_writer.entries_of([found])] == [
        "float16, bitsandbytes_4bit",
        "float16",
    ]


def test_nobody_calls_a_config_current_that_its_user_did_not() -> None:
    text = as_markdown([decision(planted.sweep(truth={"cuda_fp16": 0.5, "transformers": 1.0}))], [], "")
    assert "The baseline, `transformers`, **costs" in text and "current config" not in text
    named = decision(planted.sweep(), current=[("loading", "transformers")])
    assert "The current config, `transformers`," in as_markdown([named], [], "")


def test_the_answer_says_how_many_times_the_baselines_time_the_best_takes() -> None:
    """The ratio of pairs with its interval, which holds the planted 0.5."""
    said = describe_answer(decision(planted.sweep(10, {"cuda_fp16": 0.5, "transformers": 1.0}, bad=False)))
    found = re.search(r"Pairwise it takes ([\d.]+) times as long as `transformers` \(([\d.]+) to ([\d.]+)\)", said)
    assert found is not None
    ratio, low, high = map(float, found.groups())
    assert low <= 0.5 <= high and ratio == pytest.approx(0.5, rel=0.03)


def test_a_trade_of_dtype_is_told_in_the_answer() -> None:
    """Half the bytes in half the time is no better method: the fastest of each dtype stands in the headline."""
    made = [planted.sample("cuda_fp16", n, 1.0, job=n) for n in range(6)]
    made += [planted.sample("transformers", n, 2.0, job=6 + n, dtype="float32") for n in range(6)]
    made += [planted.sample("slow", n, 3.0, job=12 + n, dtype="float32") for n in range(6)]
    said = describe_answer(decision(made))
    assert "Not all end with the same dtype; the fastest of each is float16: `cuda_fp16` (" in said
    assert "float32: `transformers` (" in said
    assert "dtype" not in describe_answer(decision(planted.sweep(bad=False)))


def test_a_difference_that_hardly_matters_is_not_listed_as_better() -> None:
    """0.620 GiB and 0.622 GiB are told apart by every test, and by nobody who pays for memory."""
    made = planted.sweep(truth={"cuda_fp16": 1.0, "slow": 2.0}, bad=False)
    for result in made:
        slow = result.config["loading"]["name"] == "slow"
        result.metrics["memory/host_peak_rss_gib"] = (0.622 if slow else 0.620) + 1e-6 * result.identity.sample
    found = decision(made)
    row = next(line for line in as_markdown([found], [], "").splitlines() if line.startswith("| peak host memory"))
    assert "slow" not in row
    assert "slow" in next(line for line in as_markdown([found], [], "").splitlines() if line.startswith("| load time"))


def test_the_sum_of_load_and_first_token_is_an_objective() -> None:
    """Who maps pages without reading them wins the load and pays at the first token: both orders are told."""
    made = planted.sweep(truth={"lazy": 0.9, "transformers": 1.0}, bad=False)
    for result in made:
        late = 3.0 if result.config["loading"]["name"] == "lazy" else 0.1
        result.metrics["inference/first_token_s"] = late + 1e-3 * result.identity.sample
        result.metrics["inference/load_and_first_token_s"] = (
            result.metrics["load/total_s"] + result.metrics["inference/first_token_s"]
        )
    found = decision(made)
    best = {standing.objective.name: names(standing.best) for standing in found.standings if standing.best}
    assert best["load"] == {"lazy"} and best["ready"] == {"transformers"} == best["first_token"]


def test_a_warm_cache_is_advised_only_where_it_is_significantly_faster() -> None:
    """Two medians that lie apart by chance are no advice."""
    made = [planted.sample("cuda_fp16", n, 1.0, job=n, noise=0.3) for n in range(5)]
    made += [planted.sample("cuda_fp16", n, 1.4, job=5 + n, cache="cold", noise=0.3) for n in range(5)]
    decisions, _ = decide_methods(made, ["cache", "loading"])
    medians = {
        d.conditions["cache"]: d.load.leader.spread.median for d in decisions if d.load.leader and d.load.leader.spread
    }
    assert medians["cold"] > 1.1 * medians["warm"], "or there would be nothing to advise"
    assert not any("page cache" in step.text for one in decisions for step in recommend_steps(one, decisions))


def checkpoints(*names: tuple[str, str, str]) -> list[Result]:
    """Samples of two methods on each checkpoint, given by its path, fingerprint and model name."""
    made: list[Result] = []
    for path, fingerprint, name in names:
        for loading, factor in (("cuda_fp16", 0.5), ("transformers", 1.0)):
            for number in range(5):
                one = planted.sample(loading, number, factor, job=len(made))
                one.config["model"] = {"name": name, "path": path}
                one.environment = {**planted.MACHINE, "checkpoint": {"fingerprint": fingerprint}}
                one.identity = replace(one.identity, point=f"{loading} {path} {fingerprint}")
                made.append(one)
    return made


def test_two_checkpoints_are_never_ranked_as_methods() -> None:
    """A sweep over `model.path` compares methods on each: half the weights in half the time win nothing."""
    made = checkpoints(("/data/a/small", "1" * 32, "small"), ("/data/b/large", "2" * 32, "large"))
    decisions, _ = decide_methods(made, ["model.path", "loading"])
    assert [one.conditions["model"] for one in decisions] == ["large", "small"]
    assert all([point.name for point in one.load.best] == ["cuda_fp16"] for one in decisions)


def test_two_checkpoints_of_one_name_are_told_apart() -> None:
    """By what their configs say, or by their fingerprints where weights were replaced in one folder."""
    decisions, _ = decide_methods(
        checkpoints(("/data/a/mine", "1" * 32, "mine"), ("/data/b/mine", "2" * 32, "mine")), ["model.path", "loading"]
    )
    assert [one.conditions["model"] for one in decisions] == ["mine (path=/data/a/mine)", "mine (path=/data/b/mine)"]
    retrained = checkpoints(("/data/mine", "1" * 32, "mine"), ("/data/mine", "2" * 32, "mine"))
    decisions, _ = decide_methods(retrained, ["loading"])
    assert [one.conditions["model"] for one in decisions] == ["mine (111111111111)", "mine (222222222222)"]


def test_a_sample_that_never_started_stays_with_its_checkpoint() -> None:
    """It has no fingerprint, and is no other model for that."""
    made = checkpoints(("/data/mine", "1" * 32, "mine"))
    skipped = planted.failed("broken", 0, len(made))
    skipped.config["model"] = {"name": "mine", "path": "/data/mine"}
    skipped.environment = {}
    (only,), _ = decide_methods([*made, skipped], ["loading"])
    assert only.conditions["model"] == "mine" and names(only.apart) == {"broken"}


def test_nobody_can_ask_for_checkpoints_to_be_ranked() -> None:
    """Not even ``compare --by cache``."""
    made = checkpoints(("/data/a/small", "1" * 32, "small"), ("/data/b/large", "2" * 32, "large"))
    assert len(compare_points(made, ["model.path", "loading"], by=["cache"]).sections) == 2
