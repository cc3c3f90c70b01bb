"""The engines `instanttensor` and `instanttensor_buffered`: io_uring or aio into a registered ring, CUDA only.

The library's zero-copy views lie in a ring that is written again while tensors are taken, so that they cannot all be
held: its default, a copy on the device for each tensor, is what keeps them. See
https://github.com/scitix/InstantTensor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

from ladezeit.config import TensorLoading
from ladezeit.config.engines import ServerFlags
from ladezeit.config.loading import at_least
from ladezeit.loading.base import EngineSpec, LoadedTensors, LoadRequest
from ladezeit.loading.build_model import check_complete
from ladezeit.timing.clock import Clock
from ladezeit.timing.resources import GPU_BYTES_BESIDE_TORCH


@dataclass
class InstanttensorLoading(TensorLoading):
    """Arguments of InstantTensor; `io_depth` is how many reads are in flight, `threads` counts where it uses any."""

    engine: str = "instanttensor"
    io_depth: int | None = at_least(1, None)


class InstanttensorEngine:
    """Reads all shards with direct I/O, whatever the page cache holds (from tmpfs: through a mapping)."""

    buffered = False

    def prepare(self, request: LoadRequest) -> None:
        """Import the library: that is not loading."""
        import_module("instanttensor")

    @contextmanager
    def open(self, request: LoadRequest[InstanttensorLoading], clock: Clock) -> Iterator[LoadedTensors]:
        """See `TensorEngine.open`; tensors are copies that outlive the library's ring."""
        import torch
        from instanttensor import BackendPolicy, safe_open

        loading = request.loading
        number = request.device.partition(":")[2]  # the library hands the bare number to its C++ side
        device = torch.device("cuda", int(number) if number else torch.cuda.current_device())
        arguments: dict[str, Any] = {"concurrency": loading.threads, "io_depth": loading.io_depth}
        if self.buffered:
            arguments["backend"] = BackendPolicy.BUFFERED
        paths = [str(shard) for shard in request.checkpoint.shards]
        with (
            clock.span("load/read"),
            torch.cuda.device(device),
            safe_open(paths, framework="pt", device=device, copy=True, **arguments) as opened,
        ):
            tensors: dict[str, Any] = dict(opened.tensors())
            effective = _effective(opened)
            check_complete(tensors, request)
        yield LoadedTensors(tensors, borrowed=False, effective=effective)


class InstanttensorBufferedEngine(InstanttensorEngine):
    """Reads through the page cache: io_uring where the kernel allows it, else a mapping."""

    buffered = True


def _effective(opened: Any) -> dict[str, Any]:
    """Return what the library settled on: the backend says which kind of I/O it was and whether it fell back."""
    backend = opened.backend.name
    return {
        "engine": f"instanttensor {version('instanttensor')}",
        "backend": backend,
        "direct_io": backend in ("URING", "AIO", "CUFILE"),
        "threads": opened.concurrency,
        "io_depth": opened.io_depth,
        "buffer_bytes": opened.buffer_size,
        GPU_BYTES_BESIDE_TORCH: opened.buffer_size,  # its ring is from the driver, and gone when the load is over
    }


ENGINES = (
    EngineSpec(
        name="instanttensor",
        arguments=InstanttensorLoading,
        make=InstanttensorEngine,
        packages=("instanttensor",),
        devices=("cuda",),
        releases=("instanttensor>=0.2",),
        servers=ServerFlags(("--load-format", "instanttensor"), None, "pip install instanttensor"),
    ),
    EngineSpec(
        name="instanttensor_buffered",
        arguments=InstanttensorLoading,
        make=InstanttensorBufferedEngine,
        packages=("instanttensor",),
        devices=("cuda",),
        releases=("instanttensor>=0.2",),
    ),
)
