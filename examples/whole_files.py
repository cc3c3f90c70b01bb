"""A complete engine: reads each shard with one large read, and hands the tensors out as views of what was read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors.torch import load

from ladezeit.errors import LoadError, NotRunnableError
from ladezeit.loading.base import LoadedTensors, LoadRequest
from ladezeit.timing.clock import Clock


class WholeFiles:
    """Yields tensors; ladezeit makes them a model."""

    def prepare(self, request: LoadRequest) -> None:
        """Refuse what cannot work, before a clock runs."""
        if request.device != "cpu":
            raise NotRunnableError(f"whole_files reads into host memory: device={request.device} was asked for")

    @contextmanager
    def open(self, request: LoadRequest, clock: Clock) -> Iterator[LoadedTensors]:
        """Read all shards; every tensor of the checkpoint has to be there, under its own name."""
        tensors: dict[str, Any] = {}
        with clock.span("load/read"):
            for shard in request.checkpoint.shards:
                tensors |= load(shard.read_bytes())
        if not tensors:
            raise LoadError(f"no tensors in {request.checkpoint.folder}")
        yield LoadedTensors(tensors, touched=True, effective={"reads": len(request.checkpoint.shards)})
