"""Tensor parallelism: a sample of several processes that load together, are proven together and end together."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs_for_tests import TINY_MOE, make_run_config, model_config
from ladezeit.checkpoint import resolve
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import (
    DType,
    InferenceConfig,
    ProcessConfig,
    ProcessKind,
    TransformersLoading,
    ValidationConfig,
    ValidationLevel,
)
from ladezeit.config.rules import check_combination
from ladezeit.errors import CombinationError, NotRunnableError
from ladezeit.loading.engines.tensor_parallel import TensorParallelLoading
from ladezeit.loading.preflight import check_on_machine
from ladezeit.results.records import Identity, Result, Status
from ladezeit.runner.rank_launcher import first_to_report, rank_folder
from ladezeit.runner.spec import WorkerSpec
from ladezeit.runner.supervisor import Supervisor
from ladezeit.system.files import cache_folder
from ladezeit.system.gpus import ResolvedDevice
from ladezeit.system.nvml import Gpu
from ladezeit.system.page_cache import set_state
from ladezeit.validation import references
from ladezeit.validation.references import reference_key_of

Measure = Callable[..., Result]
CONTENT = ValidationConfig(ValidationLevel.content)
ONE_GPU = ResolvedDevice("cuda:0", Gpu(0, "GPU-0", "a GPU", 2**34, "1", None, None), None)


@pytest.fixture
def measure(tiny: Any, tmp_path: Path, warm_references: None) -> Measure:
    """Measure one sample in processes of its own; of model=tiny, by two ranks of an engine of the tests by default."""

    def run(
        engine: str = "", limit_s: float = 120, device: str = "cpu", checkpoint: Checkpoint = tiny, **changes: Any
    ) -> Result:
        loading = TensorParallelLoading(name="tensor_parallel", dtype=DType.float32)
        if engine:
            loading.engine = f"engines_for_tests:{engine}"
        fields = {"loading": loading, "process": ProcessConfig(ProcessKind.fresh, time_limit_s=limit_s)}
        config = make_run_config(tmp_path, **(fields | changes))
        files = references.prepare_references(
            config, reference_key_of(config, checkpoint, device=device, hardware="this", cache=cache_folder())
        )
        identity = Identity("0" * 12, 0, 0, "test", [], "ladezeit")
        spec = WorkerSpec(config, checkpoint, identity, device, tmp_path, manifest=files.manifest)
        set_state(checkpoint.shards, config.cache.state)
        with Supervisor() as supervisor:
            return supervisor.run_sample(spec)

    return run


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_ranks_say_what_one_process_says(measure: Measure, tmp_path: Path) -> None:
    """The same continuation as the plain load's; one result, which tells of both ranks and ends with the slower."""
    inference = InferenceConfig(new_tokens=8, token_ids=[5, 700, 41, 3])
    result = measure(inference=inference)
    assert result.status is Status.ok, result.reason
    ranks = result.effective["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert all(rank["memory/host_peak_rss_gib"] > 0 for rank in ranks)
    assert result.metrics["load/total_s"] >= result.effective["own_s"]
    assert "load/slowest_rank_s" in result.metrics
    loads = [phase.self_s for phase in result.phases if phase.path.split("/")[0] == "load"]
    assert sum(loads) == pytest.approx(result.metrics["load/total_s"], abs=1e-6)
    assert not (tmp_path / "lost_rank.json").exists()
    plain = measure(
        loading=TransformersLoading(name="t", device_map="device", dtype=DType.float32), inference=inference
    )
    assert result.effective["inference"] == plain.effective["inference"]


def test_the_parts_of_all_ranks_are_the_checkpoint(measure: Measure) -> None:
    """Put together, every weight is bit-equal to the plain load's, and the large ones really were split."""
    loading = TensorParallelLoading(name="tp", engine="engines_for_tests:ComparesWithThePlainLoad")
    result = measure(loading=loading)
    assert result.status is Status.ok, result.reason
    compared = result.effective["compared"]
    assert compared["differing"] == []
    assert compared["equal"] > 50
    assert {"model.layers.0.mlp.down_proj.weight", "model.layers.3.self_attn.q_proj.weight"} <= set(compared["split"])
    assert {rank["local_bytes"] for rank in result.effective["ranks"]} == {result.effective["local_bytes"]}
    assert result.effective["local_bytes"] < 0.6 * result.metrics["load/checkpoint_bytes"]


def test_the_content_of_every_ranks_part_is_proven(measure: Measure) -> None:
    """Each part is its slice of the checkpoint's tensor, bit for bit; the result says so in a sentence."""
    result = measure(validation=CONTENT)
    assert result.status is Status.ok, result.reason
    assert result.proof is not None and result.proof["passed"]
    split = result.effective["split_parameters"]
    assert f"each rank's part of {split} split weights is bit for bit its slice" in result.proof["claim"]


def test_experts_that_are_cut_inside_are_proven(measure: Measure, cache: Path) -> None:
    """Gate and up of all experts are one tensor, and a rank holds its half of each of the two."""
    model = model_config("tiny")
    model.name, model.architecture = "tiny-experts", TINY_MOE
    result = measure(checkpoint=resolve.prepare_checkpoint(model, cache), validation=CONTENT)
    assert result.status is Status.ok, result.reason
    assert result.proof is not None and "bit for bit its slice" in result.proof["claim"]


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        (
            "OneRankHoldsAnothersPart",
            "rank 1: content model.layers.1.mlp.down_proj.weight: is not rank 1's part of what the checkpoint holds: "
            "it is that of rank 0",
        ),
        (
            "OneRankSplitsOtherwise",
            "rank 1 splits 1 weights differently from rank 0 (model.layers.1.mlp.gate_proj.weight)",
        ),
    ],
)
def test_parts_that_are_not_the_whole_are_found(engine: str, told: str, measure: Measure) -> None:
    """A part that is there twice, and parts cut in two ways: bytes of the checkpoint, and not the model."""
    loading = TensorParallelLoading(name="tp", engine=f"engines_for_tests:{engine}", dtype=DType.float32)
    result = measure(loading=loading, validation=CONTENT)
    assert result.status is Status.wrong
    assert result.reason is not None
    assert result.reason.startswith(told)


def test_a_rank_that_dies_takes_the_sample_with_it(measure: Measure) -> None:
    """The others would wait for ever: they are ended at once, and the result says who was lost and of what."""
    result = measure("LosesARank")
    assert result.status is Status.killed
    assert result.reason is not None
    assert result.reason.startswith("rank 1 was ended by SIGKILL")
    assert result.metrics["sample/wall_s"] < 100


def test_an_error_of_one_rank_is_the_samples(measure: Measure) -> None:
    """What rank 1 found is not drowned in what rank 0 made of its silence."""
    result = measure("OneRankRefuses")
    assert (result.status, result.reason) == (Status.wrong, "rank 1: a weight is missing")


def test_a_rank_whose_gpu_is_full_makes_the_sample_out_of_memory(measure: Measure) -> None:
    """A model that does not fit is `oom` on several GPUs too, and says on which."""
    result = measure("OneRankIsFull")
    assert (result.status, str(result.reason)[:26]) == (Status.oom, "rank 1: CUDA out of memory")


def test_the_rank_that_reported_first_counts_not_the_one_that_ended_first(tmp_path: Path) -> None:
    """A process with a full GPU takes longer to end than one that lost its connection to it and says so."""
    for rank, (error, age_s) in enumerate(
        [({"type": "RuntimeError"}, 1), ({"type": "OutOfMemoryError"}, 2), (None, 3)]
    ):
        rank_folder(tmp_path, rank).mkdir(parents=True)
        path = rank_folder(tmp_path, rank) / "result.json"
        path.write_text(json.dumps({"error": error}))
        os.utime(path, (1000 - age_s, 1000 - age_s))
    assert first_to_report(tmp_path, 4) == 1


def test_the_model_is_proven_only_where_each_part_is(measure: Measure) -> None:
    """A head that is untied on one rank alone is found, though every address of a split tensor reads 0."""
    result = measure("OneRankUnties")
    assert result.status is Status.wrong
    assert result.reason is not None
    assert result.reason.startswith("rank 1: tie lm_head.weight")


def test_a_rank_that_hangs_is_ended_with_all_others(measure: Measure, tmp_path: Path) -> None:
    """The time limit ends the whole group, deaf ranks too."""
    result = measure("OneRankHangs", limit_s=40)
    assert result.status is Status.timeout
    pids = [int(path.read_text()) for path in tmp_path.rglob("pid")]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


@pytest.mark.parametrize("kind", [ProcessKind.prewarmed, ProcessKind.inline])
def test_ranks_are_fresh_processes(tmp_path: Path, kind: ProcessKind) -> None:
    config = make_run_config(tmp_path, loading=TensorParallelLoading(name="tp"), process=ProcessConfig(kind))
    with pytest.raises(CombinationError, match="process=fresh"):
        check_combination(config)


def test_ranks_are_not_started_by_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun every rank would measure a sweep of its own."""
    monkeypatch.setitem(os.environ, "TORCHELASTIC_RUN_ID", "none")
    loading = TensorParallelLoading(name="tp")
    config = make_run_config(tmp_path, loading=loading, process=ProcessConfig(ProcessKind.fresh))
    with pytest.raises(CombinationError, match="without torchrun"):
        check_combination(config)


def test_ranks_need_a_gpu_each() -> None:
    """Asked before anything starts: a sweep skips it."""
    with pytest.raises(NotRunnableError, match=r"loading\.ranks=99 needs .*cuda:98, found"):
        check_on_machine(TensorParallelLoading(name="tp", ranks=99), ONE_GPU)


def test_ranks_hold_whole_heads(tiny: Any) -> None:
    with pytest.raises(CombinationError, match=r"ranks=3 does not divide .*num_attention_heads=4"):
        TensorParallelLoading(name="tp", ranks=3).check_model(tiny.config)
    TensorParallelLoading(name="tp", ranks=2).check_model(tiny.config)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_on_two_gpus(measure: Measure) -> None:
    """NCCL, one GPU a rank, each with its part of the weights and no more."""
    loading = TensorParallelLoading(name="tp", engine="engines_for_tests:ComparesWithThePlainLoad")
    result = measure(loading=loading, device="cuda:0")
    assert result.status is Status.ok, result.reason
    assert [rank["device"] for rank in result.effective["ranks"]] == ["cuda:0", "cuda:1"]
    assert result.effective["compared"]["differing"] == []
