"""The engines `safetensors_mmap`, `safetensors_pread` and `safetensors_prefetch`: the format's own library.

`safe_open` either maps the file (pages arrive when they are touched) or reads it with `pread(2)`; one thread either
way. `prefetch`, from 0.9 on, starts reader threads that stage the file through pinned memory to a CUDA device. See
https://github.com/safetensors/safetensors/blob/main/bindings/python/py_src/safetensors/__init__.pyi.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ladezeit.config import TensorLoading
from ladezeit.config.engines import ServerFlags
from ladezeit.errors import CombinationError
from ladezeit.loading.base import EngineSpec, LoadedTensors, LoadRequest
from ladezeit.loading.build_model import check_complete
from ladezeit.timing.clock import Clock

#: The library's own default of `safe_open.prefetch`.
PREFETCH_THREADS = 8


@dataclass
class OneThreadLoading(TensorLoading):
    """Arguments of the engines here that read with one thread: `threads` is refused."""

    def check_arguments(self) -> None:
        """Refuse threads, which would have no effect; raises `CombinationError`."""
        if self.threads is not None:
            raise CombinationError(
                f"loading.threads={self.threads} was given with loading.engine={self.engine}, which reads with one "
                f"thread. Leave it out, or use an engine with threads"
            )


class SafetensorsMmapEngine:
    """Opens each shard as a private mapping; on the CPU the tensors are the mapping, so that nothing is read yet."""

    backend = "mmap"

    def prepare(self, request: LoadRequest) -> None:
        """Nothing has to be ready before the clock starts."""

    @contextmanager
    def open(self, request: LoadRequest, clock: Clock) -> Iterator[LoadedTensors]:
        """See `TensorEngine.open`; a tensor keeps its mapping alive, and is valid after the context."""
        from safetensors import safe_open

        # older versions map and have no such argument
        chosen = {} if self.backend == "mmap" else {"backend": self.backend}
        tensors: dict[str, Any] = {}
        with clock.span("load/read"):
            for shard in request.checkpoint.shards:
                with safe_open(str(shard), framework="pt", device=request.device, **chosen) as opened:
                    for name in opened.offset_keys():
                        tensors[name] = opened.get_tensor(name)
            check_complete(tensors, request)
        yield LoadedTensors(
            tensors,
            borrowed=False,
            effective={"engine": f"safetensors {version('safetensors')}", "backend": self.backend, "threads": 1},
        )


class SafetensorsPreadEngine(SafetensorsMmapEngine):
    """Reads each tensor with `pread(2)` into memory of its own, through the page cache."""

    backend = "pread"


class SafetensorsPrefetchEngine:
    """Reads ahead with threads through pinned memory; CUDA only, safetensors 0.9 or later."""

    def prepare(self, request: LoadRequest) -> None:
        """Nothing has to be ready before the clock starts."""

    @contextmanager
    def open(self, request: LoadRequest[TensorLoading], clock: Clock) -> Iterator[LoadedTensors]:
        """See `TensorEngine.open`; tensors that were handed out keep their memory after their loader is closed."""
        loading = request.loading
        threads = loading.threads or PREFETCH_THREADS
        tensors: dict[str, Any] = {}
        with clock.span("load/read"), ExitStack() as stack:
            ahead: Any = None
            # One shard is read ahead of the one that is taken: the storage never waits, and threads stay few.
            for shard in request.checkpoint.shards:
                started = _start(stack, str(shard), request.device, threads)
                if ahead is not None:
                    tensors.update(iter(ahead))
                ahead = started
            tensors.update(iter(ahead))
            check_complete(tensors, request)
        yield LoadedTensors(
            tensors,
            borrowed=False,
            effective={
                "engine": f"safetensors {version('safetensors')}",
                "backend": "prefetch",
                "threads": threads,
                "shards_in_flight": min(2, len(request.checkpoint.shards)),
            },
        )


def _start(stack: ExitStack, shard: str, device: str, threads: int) -> Any:
    from safetensors import safe_open

    opened = stack.enter_context(safe_open(shard, framework="pt", device=device))
    return stack.enter_context(opened.prefetch(threads=threads))


#: The flags of servers that read as these engines do; `from_pretrained` maps, too, where it is not told otherwise.
MAPPED_ON_SERVERS = ServerFlags(
    ("--load-format", "safetensors", "--safetensors-load-strategy", "lazy"), ("--load-format", "safetensors")
)
READ_ON_SERVERS = ServerFlags(
    ("--load-format", "safetensors", "--safetensors-load-strategy", "eager"),
    ("--load-format", "safetensors", "--weight-loader-disable-mmap"),
    "whole shards go through host memory",
)

ENGINES = (
    EngineSpec(
        name="safetensors_mmap", arguments=OneThreadLoading, make=SafetensorsMmapEngine, servers=MAPPED_ON_SERVERS
    ),
    EngineSpec(
        name="safetensors_pread",
        arguments=OneThreadLoading,
        make=SafetensorsPreadEngine,
        releases=("safetensors>=0.8",),
        servers=READ_ON_SERVERS,
    ),
    EngineSpec(
        name="safetensors_prefetch",
        arguments=TensorLoading,
        make=SafetensorsPrefetchEngine,
        devices=("cuda",),
        releases=("safetensors>=0.9.0rc1",),
    ),
)
