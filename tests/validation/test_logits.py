"""The level `logits`: what a model says, against a reference load; and `full` through a real worker."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs_for_tests import make_run_config
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import (
    ProcessConfig,
    ProcessKind,
    RuntimeConfig,
    TransformersLoading,
    ValidationConfig,
    ValidationLevel,
)
from ladezeit.config.rules import check_combination
from ladezeit.errors import CombinationError
from ladezeit.loading.engines.tensor_parallel import TensorParallelLoading
from ladezeit.results.records import Identity, Result, Status
from ladezeit.runner.spec import WorkerSpec
from ladezeit.runner.supervisor import Supervisor
from ladezeit.validation.logits import (
    GreedyOutput,
    Reference,
    check_logits,
    compute_tolerance,
    read_reference,
    reference_file,
    run_greedy,
    shift_weights,
    sure_tokens,
)
from ladezeit.validation.reference_cache import ReferenceKey
from ladezeit.validation.references import prepare_references, reference_key_of

Sample = Callable[..., Result]


@pytest.fixture(scope="module")
def reference(tiny: Checkpoint, cache: Path) -> Reference:
    """What two real reference loads of model=tiny say."""
    subject = ReferenceKey(tiny, "tiny", "bfloat16", "cpu", cache, hardware="this")
    file = reference_file(subject, RuntimeConfig())
    made: list[str] = []
    assert reference_file(subject, RuntimeConfig(), lambda: made.append("again")) == file
    assert made == []
    return read_reference(file)


@pytest.fixture
def model(tiny: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.bfloat16)


def test_the_same_weights_say_the_same(model: Any, reference: Reference) -> None:
    """No false alarm, and figures that say how near it was."""
    found = check_logits(model, reference)
    assert found.findings == []
    assert found.metrics["validation/tokens_equal"] == 1
    assert found.metrics["validation/logits_difference"] <= reference.tolerance
    assert reference.noise <= reference.tolerance
    assert reference.sure_tokens > 0


@pytest.mark.parametrize("planted", [2.0, float("nan"), float("inf")])
def test_other_weights_are_heard(model: Any, reference: Reference, planted: float) -> None:
    """A value that matters is heard, and a NaN always: no comparison with it passes."""
    model.model.norm.weight.data[:8] = planted
    kinds = {finding.kind for finding in check_logits(model, reference).findings}
    assert "logits" in kinds


def test_differences_count_numbers_and_what_is_none() -> None:
    """NaN on both sides is equal, on one side it is infinitely far."""
    one = GreedyOutput(np.array([1.0, np.nan, np.inf], dtype=np.float32), [1], [0.5])
    assert one.max_difference(one) == 0
    assert one.max_difference(replace(one, logits=np.array([1.5, np.nan, np.inf], dtype=np.float32))) == 0.5
    assert one.max_difference(replace(one, logits=np.array([1.0, 0.0, np.inf], dtype=np.float32))) == float("inf")
    assert one.max_difference(replace(one, logits=np.array([1.0, np.nan, -np.inf], dtype=np.float32))) == float("inf")
    assert one.max_difference(replace(one, logits=np.zeros(2, dtype=np.float32))) == float("inf")
    assert GreedyOutput.from_plain(one.to_plain()).max_difference(one) == 0


def test_tolerance_is_noise_times_four_or_one_step() -> None:
    """A device that repeats itself bit for bit still rounds: one step of its dtype is let pass."""
    said = GreedyOutput(np.array([-16.0, 3.0], dtype=np.float32), [0], [19.0])
    assert compute_tolerance(said, 0.0, "bfloat16") == 16 * 2**-7
    assert compute_tolerance(said, 1.0, "bfloat16") == 4.0


def test_tokens_that_noise_may_turn_are_told_and_are_no_fault(model: Any, reference: Reference) -> None:
    """Where what is let pass decides, another token is no fault; where it cannot, it is."""
    ids = reference.spoken.token_ids
    for first_other in (0, 3):
        other = replace(reference.spoken, token_ids=[*ids[:first_other], *[-1] * (len(ids) - first_other)])
        sure = check_logits(model, replace(reference, spoken=other, sure_tokens=first_other + 1))
        assert [finding.kind for finding in sure.findings] == ["tokens"]
        turned = check_logits(model, replace(reference, spoken=other, sure_tokens=first_other))
        assert turned.findings == []
        assert f"{first_other} of 8 greedy tokens equal" in turned.summary
        assert turned.metrics["validation/tokens_equal"] == 0


def test_a_token_is_sure_that_both_loads_said_by_twice_what_is_let_pass() -> None:
    """One logit may fall by the tolerance and another rise by it."""
    none = np.zeros(4, dtype=np.float32)
    one = GreedyOutput(none, [1, 2, 3], [5.0, 1.1, 5.0])
    assert sure_tokens(one, one, 0.5) == 3
    assert sure_tokens(one, one, 0.55) == 1
    assert sure_tokens(one, replace(one, token_ids=[1, 2, 0]), 0.5) == 2
    assert sure_tokens(one, replace(one, token_ids=[0, 2, 3]), 0.0) == 0
    assert sure_tokens(replace(one, leads=[math.nan, 5.0, 5.0]), one, 0.0) == 0


def test_the_calibrating_load_has_the_same_weights_elsewhere(model: Any) -> None:
    """What two loads say differently is then due to where weights lie, which engines differ in; ties stay ties."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    shift_weights(model, 16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {parameter.data_ptr() % 64 for parameter in model.parameters()} == {16}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_speaking_changes_nothing(model: Any) -> None:
    """The proof leaves the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = run_greedy(model)
    assert run_greedy(model).max_difference(said) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def sample(warm_references: None, supervisor: Supervisor, tiny: Checkpoint, tmp_path: Path, cache: Path) -> Sample:
    """Measure one sample in a real worker, by what `prepare` made ready."""

    def run(level: str, engine: str = "transformers") -> Result:
        loading = TransformersLoading(name="t", engine=engine, device_map="device")
        config = make_run_config(tmp_path, validation=ValidationConfig(ValidationLevel(level)), loading=loading)
        files = prepare_references(config, reference_key_of(config, tiny, device="cpu", hardware="this", cache=cache))
        own = tmp_path / "sample"
        own.mkdir()
        spec = WorkerSpec(
            config,
            tiny,
            Identity("p", 0, 0, "test", [], "command"),
            "cpu",
            own,
            manifest=files.manifest,
            reference=files.reference,
        )
        return supervisor.run_sample(spec)

    return run


@pytest.mark.parametrize(
    ("level", "costs"),
    [
        ("placement", set()),
        ("content", {"validation/content_s"}),
        ("logits", {"validation/logits_s"}),
        ("full", {"validation/content_s", "validation/logits_s"}),
    ],
)
def test_a_worker_proves_as_far_as_asked(level: str, costs: set[str], sample: Sample, tmp_path: Path) -> None:
    """The proof, its claim and its cost are in the sample's result."""
    result = sample(level)
    assert result.status is Status.ok, result.reason
    assert result.proof is not None
    assert result.proof["passed"]
    assert {name for name in result.metrics if name in {"validation/content_s", "validation/logits_s"}} == costs
    assert result.metrics["validation/total_s"] >= sum(result.metrics[name] for name in costs)
    order = [phase.path for phase in result.phases]
    if level in ("logits", "full"):
        assert order.index("validation/logits") > order.index("inference/first_token")
    assert not (tmp_path / "sample" / "findings.json").exists()


def test_a_wrong_model_is_wrong_with_all_findings_in_a_file(sample: Sample, tmp_path: Path) -> None:
    """One flipped bit in a worker's memory ends the sample as `wrong`, and the file names the tensor."""
    result = sample("full", "engines_for_tests:FlipsABit")
    assert result.status is Status.wrong
    assert result.reason is not None
    assert "content model.norm.weight" in result.reason
    findings = json.loads((tmp_path / "sample" / "findings.json").read_text())
    assert [(finding["kind"], finding["name"]) for finding in findings] == [("content", "model.norm.weight")]
    assert "inference/first_token_s" not in result.metrics


@pytest.mark.parametrize("level", ["logits", "full"])
def test_what_ranks_say_is_not_compared_with_one_process(level: str, tmp_path: Path) -> None:
    """Ranks add up in another order: they are never called wrong for that, the level says no beforehand."""
    changes: Any = {"process": ProcessConfig(ProcessKind.fresh), "loading": TensorParallelLoading(name="x")}
    config = make_run_config(tmp_path, validation=ValidationConfig(ValidationLevel(level)), **changes)
    with pytest.raises(CombinationError, match="validation=content"):
        check_combination(config)
