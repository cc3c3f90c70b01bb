"""The engine `tensor_parallel`: `from_pretrained` with the model's own plan, on one of several ranks.

Each rank is a process of its own that reads every shard and keeps its part of each split weight as a DTensor. Where the
processes come from is `ladezeit.runner.rank_launcher`; they meet at the address that it passes in the environment, as
under torchrun.
See https://huggingface.co/docs/transformers/perf_infer_gpu_multi.
"""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any

from ladezeit.config import LoadingConfig, ProcessKind, RunConfig, ValidationLevel
from ladezeit.config.loading import at_least
from ladezeit.errors import CombinationError, LoadError, NotRunnableError
from ladezeit.loading.base import EngineModel, EngineSpec, LoadRequest
from ladezeit.loading.engines.transformers import from_pretrained
from ladezeit.model.tensors import fault_in_pages, local_part
from ladezeit.timing.clock import LOAD, Clock

#: How long ranks wait for each other; the supervisor's limit ends them earlier.
_PATIENCE = timedelta(hours=2)


@dataclass
class TensorParallelLoading(LoadingConfig):
    """Arguments of a load over several processes: each of `ranks` holds its share of every split weight."""

    engine: str = "tensor_parallel"
    ranks: int = at_least(2, 2)

    @property
    def process_count(self) -> int:
        """One process a rank."""
        return self.ranks

    def check_run(self, run: RunConfig) -> None:
        """Refuse what several processes cannot be asked for; raises `CombinationError`."""
        asked = f"loading.ranks={self.ranks} (loading={self.name})"
        if run.validation.level in (ValidationLevel.logits, ValidationLevel.full):
            raise CombinationError(
                f"{asked} was given with validation={run.validation.level.value}: ranks add up their parts in an order "
                f"of their own, so that logits differ from one process's by more than its noise. Use "
                f"validation=content, which verifies every rank's part bit for bit"
            )
        if run.process.kind is not ProcessKind.fresh:
            raise CombinationError(
                f"{asked} was given with process={run.process.kind.value}: each rank is a new interpreter, because a "
                f"process group cannot be forked or shared. Use process=fresh"
            )
        if run.device.startswith("cuda:") and run.device != "cuda:0":
            raise CombinationError(
                f"{asked} takes the GPUs from cuda:0 on, and device={run.device} was asked for. Use device=cuda, and "
                f"CUDA_VISIBLE_DEVICES to choose among the GPUs"
            )
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise CombinationError(f"{asked} starts its ranks itself: run ladezeit alone, without torchrun")
        if run.profile:
            raise CombinationError(
                f"profile=true was given with loading={self.name}, which is several processes: the profiler sees one. "
                f"Leave it out, or profile the load of one device"
            )

    def check_model(self, model: dict[str, Any]) -> None:
        """Refuse a number of ranks that cannot share the model's heads evenly; raises `CombinationError`."""
        counts = {
            key: model[key] for key in ("num_attention_heads", "num_key_value_heads") if isinstance(model.get(key), int)
        }
        uneven = [f"{key}={count}" for key, count in counts.items() if count % self.ranks]
        if uneven:
            raise CombinationError(
                f"loading.ranks={self.ranks} does not divide the model's {' and '.join(uneven)}: each rank holds whole "
                f"heads. Use a number of ranks that divides them"
            )


class TensorParallelEngine:
    """Loads this rank's part of the model, and waits for the slowest rank: only then is the model there."""

    def prepare(self, request: LoadRequest) -> None:
        """Meet the other ranks, so that all start to load together.

        Raises:
            NotRunnableError: the installed transformers takes no plan.
        """
        import torch.distributed as dist
        from transformers import __version__

        if not _knows_plans():
            raise NotRunnableError(f"loading=tensor_parallel needs transformers>=5.17, {__version__} is installed")
        if not dist.is_initialized():
            _meet(request)
        dist.barrier()

    def load(self, request: LoadRequest[TensorParallelLoading], clock: Clock) -> EngineModel:
        """See `Engine.load`; `effective` has this rank's own seconds and bytes.

        Raises:
            LoadError: no weight was split: the model's class has no plan.
        """
        import torch.distributed as dist
        from transformers.distributed import DistributedConfig

        started_ns = time.monotonic_ns()
        loading = request.loading
        plan = DistributedConfig(tp_plan="auto", tp_size=loading.ranks)
        loaded = from_pretrained(request, clock, dtype=loading.dtype.value, distributed_config=plan)
        loaded.effective["arguments"]["distributed_config"] = {"tp_plan": "auto", "tp_size": loading.ranks}
        split = [parameter for parameter in loaded.model.parameters() if local_part(parameter) is not parameter]
        if not split:
            raise LoadError(
                f"{type(loaded.model).__name__} has no plan for tensor parallelism: every rank holds all of it. "
                f"Use loading=device_map_balanced"
            )
        with clock.span("load/touch"):
            loaded.effective["touched_bytes"] = fault_in_pages(loaded.model)
        clock.synchronize(LOAD)
        loaded.effective |= {"split_parameters": len(split), "local_bytes": _local_bytes(loaded.model)}
        loaded.effective["own_s"] = (time.monotonic_ns() - started_ns) / 1e9
        with clock.span("load/slowest_rank"):
            dist.barrier()
        return loaded


def _knows_plans() -> bool:
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return False
    return "tp_plan" in signature(DistributedConfig).parameters


def _meet(request: LoadRequest) -> None:
    """Open the process group: gloo on the CPU, NCCL on GPUs; rank 0 serves the store on a socket it was given."""
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, and left out of torch's stubs

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    descriptor = os.environ.get("LADEZEIT_STORE_FD")
    serve: dict[str, Any] = {"master_listen_fd": int(descriptor)} if rank == 0 and descriptor else {}
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks,
        is_master=rank == 0,
        timeout=_PATIENCE,
        **serve,
    )
    on_gpu = request.device.startswith("cuda")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=ranks,
        timeout=_PATIENCE,
        device_id=torch.device(request.device) if on_gpu else None,
    )


def _local_bytes(model: Any) -> int:
    """Return the bytes of weights that this rank holds; a tied weight counts once."""
    parts = {id(parameter): local_part(parameter) for parameter in model.parameters()}
    return sum(part.numel() * part.element_size() for part in parts.values())


ENGINES = (EngineSpec(name="tensor_parallel", arguments=TensorParallelLoading, make=TensorParallelEngine),)
