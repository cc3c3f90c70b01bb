"""The engine `runai_streamer`: NVIDIA's Run:ai Model Streamer, concurrent reads into a ring of host buffers.

Its settings are environment variables, read when a streamer starts; they are set for that time alone. With ``owned``
(from 0.17 on) a buffer that was handed out is never written again, so tensors on the CPU need no copy. See
https://github.com/run-ai/runai-model-streamer/blob/master/docs/src/env-vars.md.
"""

import json
from collections.abc import Iterator, Mapping
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
from ladezeit.system.processes import set_variables
from ladezeit.timing.clock import Clock


@dataclass
class RunaiLoading(TensorLoading):
    """Arguments of the Run:ai Model Streamer; `buffer_bytes` bounds its ring of host buffers."""

    engine: str = "runai_streamer"
    buffer_bytes: int | None = at_least(4096, None)


class RunaiStreamerEngine:
    """Streams all shards at once and takes the tensors in the order in which they arrive."""

    def prepare(self, request: LoadRequest) -> None:
        """Import the library: that is not loading."""
        import_module("runai_model_streamer")

    @contextmanager
    def open(self, request: LoadRequest[RunaiLoading], clock: Clock) -> Iterator[LoadedTensors]:
        """See `TensorEngine.open`; each tensor keeps its buffer alive and is valid after the context."""
        from runai_model_streamer import SafetensorsStreamer

        loading = request.loading
        settings = {
            "RUNAI_STREAMER_CONCURRENCY": None if loading.threads is None else str(loading.threads),
            "RUNAI_STREAMER_MEMORY_LIMIT": None if loading.buffer_bytes is None else str(loading.buffer_bytes),
            "RUNAI_STREAMER_PROCESS_GROUP_SIZE": None,  # the library sets it for good
        }
        paths = [str(shard) for shard in request.checkpoint.shards]
        with set_variables(settings), clock.span("load/read"), SafetensorsStreamer() as streamer:
            streamer.stream_files(paths, device=request.device, owned=True)
            tensors: dict[str, Any] = dict(streamer.get_tensors())
            ring = streamer.file_streamer.ring_info()
            unaligned = streamer.unaligned_copies
            check_complete(tensors, request)
        effective = {
            "engine": f"runai-model-streamer {version('runai-model-streamer')}",
            "threads": loading.threads,
            "unaligned_copies": unaligned,
        }
        if ring is not None:
            effective |= {"ring_buffers": ring[1], "ring_buffer_bytes": ring[2]}
        yield LoadedTensors(tensors, borrowed=False, effective=effective)


def _server_flags(loading: Mapping[str, Any]) -> ServerFlags:
    requested = {"concurrency": loading.get("threads"), "memory_limit": loading.get("buffer_bytes")}
    extra = {key: value for key, value in requested.items() if value is not None}
    flags = ("--load-format", "runai_streamer", *(("--model-loader-extra-config", json.dumps(extra)) if extra else ()))
    return ServerFlags(flags, flags, "pip install 'vllm[runai]', or runai-model-streamer beside SGLang")


ENGINES = (
    EngineSpec(
        name="runai_streamer",
        arguments=RunaiLoading,
        make=RunaiStreamerEngine,
        packages=("runai_model_streamer",),
        releases=("runai-model-streamer>=0.17",),
        servers=_server_flags,
    ),
)
