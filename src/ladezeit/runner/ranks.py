"""The measurement of one rank: a sample whose ranks agree on everything before any of it counts."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ladezeit.errors import LoadError
from ladezeit.model.tensors import shard_specs
from ladezeit.results.records import Status
from ladezeit.runner.rank_launcher import rank_folder
from ladezeit.runner.sample import Sample
from ladezeit.runner.spec import WorkerSpec

if TYPE_CHECKING:
    from ladezeit.loading.base import EngineModel
    from ladezeit.timing.resources import ResourceMeter
    from ladezeit.validation.expected import Expected
    from ladezeit.validation.verification import Verification


class RankSample(Sample):
    """One rank of a tensor-parallel sample; rank 0's result speaks for all, the others' only where they fail."""

    def __init__(self, spec: WorkerSpec, origin_ns: int, notify: Callable[[str], None]) -> None:
        self.rank = int(os.environ["RANK"])
        device = f"cuda:{self.rank}" if spec.device.startswith("cuda") else spec.device
        own = replace(spec, device=device, folder=rank_folder(spec.folder, self.rank))
        own.folder.mkdir(parents=True, exist_ok=True)
        super().__init__(own, origin_ns, notify if self.rank == 0 else lambda phase: None)

    def _cache_is_as_asked(self) -> bool:
        """Let rank 0 look while the others wait: a rank that loads already would be what it finds."""
        import torch.distributed as dist

        said = [super()._cache_is_as_asked()] if self.rank == 0 else [False]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def _look_at(self, loaded: "EngineModel", meter: "ResourceMeter") -> None:
        super()._look_at(loaded, meter)
        own = {key: loaded.effective[key] for key in ("own_s", "local_bytes", "split_parameters")}
        memory = {key: value for key, value in meter.read_metrics().items() if key.startswith("memory/")}
        self.result.effective["ranks"] = _gather({"rank": self.rank, "device": self.spec.device, **own, **memory})

    def _verify(self, loaded: "EngineModel", wanted: "Expected") -> "Verification | None":
        """Verify this rank's part; the model is verified only where every rank's part is, and all split it alike."""
        verification = super()._verify(loaded, replace(wanted, rank=self.rank))
        verdicts = _gather((verification is not None, self.result.reason, shard_specs(loaded.model)))
        for rank, (right, reason, _) in enumerate(verdicts):
            if not right:
                self._wrong(f"rank {rank}: {reason}")
                return None
        first = verdicts[0][2]
        for rank, (_, _, other) in enumerate(verdicts):
            apart = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
            if apart:
                what = (
                    f"splits {len(apart)} weights differently from rank 0 ({apart[0]}): their parts are not the whole"
                )
                self._wrong(f"rank {rank} {what}")
                return None
        return verification

    def _wrong(self, reason: str) -> None:
        self.result.status = Status.wrong
        self.result.reason = reason

    def _infer(self, loaded: "EngineModel") -> None:
        super()._infer(loaded)
        said = _gather(self.result.effective.get("inference", {}).get("token_ids"))
        if any(other != said[0] for other in said):
            raise LoadError(f"the ranks continue the same prompt differently: {said}")


def _gather(own: Any) -> list[Any]:
    """Return what every rank has given, in the order of ranks."""
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered
