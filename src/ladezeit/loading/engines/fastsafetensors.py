"""The engines `fastsafetensors` and `fastsafetensors_gds`: one device allocation a file, filled by reader threads.

Without GPUDirect Storage the threads read into pinned bounce buffers (O_DIRECT on local disks, whatever the page cache
holds); with it the storage writes into GPU memory itself. Where the library finds no GDS it falls back with a warning;
here that is an error. See https://github.com/foundation-model-stack/fastsafetensors.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

from ladezeit.config import TensorLoading
from ladezeit.config.engines import ServerFlags
from ladezeit.config.loading import at_least
from ladezeit.errors import LoadError
from ladezeit.loading.base import EngineSpec, LoadedTensors, LoadRequest
from ladezeit.loading.build_model import check_complete
from ladezeit.system.processes import set_variables
from ladezeit.timing.clock import Clock

#: The library's own defaults of `SafeTensorsFileLoader`.
THREADS = 16
BUFFER_BYTES = 16 * 2**20
_DIRECT = "FASTSAFETENSORS_ODIRECT"


@dataclass
class FastsafetensorsLoading(TensorLoading):
    """Arguments of fastsafetensors; `direct` forces O_DIRECT on or off, `buffer_bytes` sizes its bounce buffers."""

    engine: str = "fastsafetensors"
    direct: bool | None = None
    buffer_bytes: int | None = at_least(4096, None)


class FastsafetensorsEngine:
    """Loads all shards at once through bounce buffers; also to host memory."""

    gds = False

    def prepare(self, request: LoadRequest) -> None:
        """Import the library: that is not loading."""
        import_module("fastsafetensors")

    @contextmanager
    def open(self, request: LoadRequest[FastsafetensorsLoading], clock: Clock) -> Iterator[LoadedTensors]:
        """See `TensorEngine.open`; tensors are views that own a share of their file's one allocation.

        Raises:
            LoadError: GDS was asked for and the library chose another way.
        """
        loading = request.loading
        direct = None if loading.direct is None else str(int(loading.direct))
        with set_variables({_DIRECT: direct}), ExitStack() as stack:
            with clock.span("load/read"):
                loader = self._loader(loading, request)
                stack.callback(loader.close)
                buffers = loader.copy_files_to_device()
                stack.callback(buffers.close)
                self._refuse_fallback(loading)
                tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
                check_complete(tensors, request)
            yield LoadedTensors(tensors, borrowed=False, effective=self._effective(loader, loading, request))

    def _loader(self, loading: FastsafetensorsLoading, request: LoadRequest[FastsafetensorsLoading]) -> Any:
        from fastsafetensors import SafeTensorsFileLoader

        loader = SafeTensorsFileLoader(
            None,
            request.device,
            bbuf_size_kb=(loading.buffer_bytes or BUFFER_BYTES) // 1024,
            max_threads=loading.threads or THREADS,
            nogds=not self.gds,
        )
        backend = loader.copier_class.__name__
        if self.gds and backend != "GdsFileCopier":
            loader.close()
            raise LoadError(
                f"loading.engine={loading.engine} asked for GPUDirect Storage, and fastsafetensors fell back to "
                f"{backend}: libcufile or its driver is missing here. Use loading=fastsafetensors"
            )
        loader.add_filenames({0: [str(shard) for shard in request.checkpoint.shards]})
        return loader

    def _refuse_fallback(self, loading: FastsafetensorsLoading) -> None:
        # A file that cuFile refuses is read through the host, and only this mark of the warning tells.
        if self.gds and getattr(import_module("fastsafetensors.copier.gds"), "_warned_gds_fallback", False):
            raise LoadError(
                f"loading.engine={loading.engine} asked for GPUDirect Storage, and fastsafetensors read files through "
                f"host memory: cuFile refused them. Put the checkpoint on a disk that it supports, or use "
                f"loading=fastsafetensors"
            )

    def _effective(
        self, loader: Any, loading: FastsafetensorsLoading, request: LoadRequest[FastsafetensorsLoading]
    ) -> dict[str, Any]:
        from fastsafetensors.common import is_odirect_enabled

        effective = {
            "engine": f"fastsafetensors {version('fastsafetensors')}",
            "backend": loader.copier_class.__name__,
            "threads": loading.threads or THREADS,
            "buffer_bytes": loading.buffer_bytes or BUFFER_BYTES,
        }
        if not self.gds:
            # The library's policy; a filesystem that refuses O_DIRECT after all is read buffered, with its warning.
            effective["direct_io"] = is_odirect_enabled(str(request.checkpoint.shards[0]), buffered_ram_fs=True)
        return effective


class FastsafetensorsGdsEngine(FastsafetensorsEngine):
    """Loads with GPUDirect Storage, from storage to GPU memory without the host's; CUDA only."""

    gds = True


_FLAGS = ("--load-format", "fastsafetensors")
_ON_SERVERS = ServerFlags(_FLAGS, _FLAGS, "uses GPU direct storage where it is there")

ENGINES = (
    EngineSpec(
        name="fastsafetensors",
        arguments=FastsafetensorsLoading,
        make=FastsafetensorsEngine,
        packages=("fastsafetensors",),
        releases=("fastsafetensors>=0.5",),
        cuda_library="libcudart.so",
        servers=_ON_SERVERS,
    ),
    EngineSpec(
        name="fastsafetensors_gds",
        arguments=FastsafetensorsLoading,
        make=FastsafetensorsGdsEngine,
        packages=("fastsafetensors",),
        devices=("cuda",),
        releases=("fastsafetensors>=0.5",),
        device_file="/dev/nvidia-fs0",
        cuda_library="libcudart.so",
        servers=_ON_SERVERS,
    ),
)
