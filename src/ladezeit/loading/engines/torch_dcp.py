"""The engine `torch_dcp`: PyTorch's distributed checkpoint reader for Hugging Face folders, on one process.

It maps each shard and copies every tensor into one that was made on the device before; a thread a shard at most. See
https://docs.pytorch.org/docs/stable/distributed.checkpoint.html.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ladezeit.checkpoint.dtypes import torch_dtype
from ladezeit.config import TensorLoading
from ladezeit.errors import LoadError
from ladezeit.loading.base import EngineSpec, LoadedTensors, LoadRequest
from ladezeit.loading.build_model import check_complete
from ladezeit.timing.clock import Clock


class TorchDcpEngine:
    """Loads through `HuggingFaceStorageReader` into tensors of its own."""

    def prepare(self, request: LoadRequest) -> None:
        """Check what the reader cannot be told: it reads every .safetensors file of the folder.

        Raises:
            LoadError: the folder has more of them than the checkpoint, or a dtype that torch has no tensor for.
        """
        checkpoint = request.checkpoint
        extra = {path.name for path in checkpoint.folder.glob("*.safetensors")} - {s.name for s in checkpoint.shards}
        if extra:
            raise LoadError(
                f"loading.engine=torch_dcp reads every .safetensors file of a folder, and {checkpoint.folder} has "
                f"{', '.join(sorted(extra))} besides the checkpoint's own. Move them, or use another engine"
            )
        unknown = sorted({entry.dtype for entry in checkpoint.tensors if torch_dtype(entry.dtype) is None})
        if unknown:
            raise LoadError(f"loading.engine=torch_dcp cannot hold tensors of {', '.join(unknown)}: use another engine")
        import_module("torch.distributed.checkpoint.hf_storage")  # takes time, and is not loading

    @contextmanager
    def open(self, request: LoadRequest[TensorLoading], clock: Clock) -> Iterator[LoadedTensors]:
        """See `TensorEngine.open`; the tensors are torch's own."""
        import torch
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        loading = request.loading
        shards = len(request.checkpoint.shards)
        threads = min(loading.threads or 1, shards)
        with clock.span("load/allocate"):
            tensors: dict[str, Any] = {
                entry.name: torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device=request.device)
                for entry in request.checkpoint.tensors
            }
        with clock.span("load/read"):
            reader = HuggingFaceStorageReader(str(request.checkpoint.folder), thread_count=threads)
            with warnings.catch_warnings():  # it warns that one process is one process
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                _load(tensors, reader)
            check_complete(tensors, request)
        yield LoadedTensors(
            tensors,
            borrowed=False,
            effective={"engine": f"torch {torch.__version__}", "backend": "mmap", "threads": threads},
        )


def _load(tensors: dict[str, Any], reader: Any) -> None:
    """Fill the tensors; raises what went wrong, not what the library puts around it, which is no `Exception`."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    failure: BaseException | None = None
    try:
        load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as failed:
        failure = next(iter(failed.failures.values()))[0]
    if failure is not None:  # raised out here, so that it keeps what it came from
        raise failure


ENGINES = (EngineSpec(name="torch_dcp", arguments=TensorLoading, make=TorchDcpEngine),)
