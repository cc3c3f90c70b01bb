"""The engine `tensorizer`: CoreWeave's format and reader, from files that were converted once.

Each reader thread reads its part of the file through the page cache, tensor by tensor: on the CPU into memory that the
tensor keeps, on a GPU into a pinned buffer as large as its largest tensor, and from there to the device. A reader does
not notice that a file ends too early (the tensor keeps what its memory held before), nor, without `verify_hash`, that a
byte is another: lengths are therefore checked before the load.

Nothing in the format is code: names, dtypes and shapes are plain, and the reader never unpickles. (The library's
``torch_compat``, which does, is for whole torch.save files and is not used.) See
https://github.com/coreweave/tensorizer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ladezeit.config import TensorLoading
from ladezeit.config.engines import ServerFlags
from ladezeit.errors import LoadError
from ladezeit.loading.base import EngineSpec, LoadedTensors, LoadRequest
from ladezeit.loading.build_model import check_complete
from ladezeit.loading.conversion import converted_files
from ladezeit.timing.clock import Clock


@dataclass
class TensorizerLoading(TensorLoading):
    """Arguments of tensorizer; `threads` read, `verify_hash` compares every tensor with the hashes in its file."""

    engine: str = "tensorizer"
    verify_hash: bool = False


class TensorizerEngine:
    """Loads with ``TensorDeserializer``, file after file."""

    def prepare(self, request: LoadRequest) -> None:
        """Check that the converted files are whole, and import the library: that is not loading."""
        converted_files(request)
        import_module("tensorizer")

    @contextmanager
    def open(self, request: LoadRequest[TensorizerLoading], clock: Clock) -> Iterator[LoadedTensors]:
        """See `TensorEngine.open`; every tensor has memory of its own, valid after the reader is closed.

        Raises:
            LoadError: a file is damaged, as far as the reader notices.
        """
        loading = request.loading
        tensors: dict[str, Any] = {}
        threads = bytes_read = 0
        with clock.span("load/read"):
            for path in converted_files(request):
                opened = _deserialized(path, request.device, loading)
                tensors.update((name, opened[name].detach()) for name in opened)
                threads = max(threads, getattr(opened, "_num_readers", loading.threads or 0))
                bytes_read += opened.total_tensor_bytes
                opened.close()
            check_complete(tensors, request)
        yield LoadedTensors(
            tensors,
            borrowed=False,
            effective={
                "engine": f"tensorizer {version('tensorizer')}",
                "threads": threads,
                "verify_hash": loading.verify_hash,
                "bytes_read_buffered": bytes_read,
            },
        )


def _deserialized(path: Path, device: str, loading: TensorizerLoading) -> Any:
    from tensorizer import TensorDeserializer
    from tensorizer.serialization import HashMismatchError

    try:
        return TensorDeserializer(
            str(path), device=device, num_readers=loading.threads, verify_hash=loading.verify_hash
        )
    except (HashMismatchError, ValueError) as cause:
        raise LoadError(
            f"{path} is damaged: {cause}. Remove its folder: it is made again from the checkpoint"
        ) from cause


ENGINES = (
    EngineSpec(
        name="tensorizer",
        arguments=TensorizerLoading,
        make=TensorizerEngine,
        packages=("tensorizer",),
        releases=("tensorizer>=2.12",),
        converter="ladezeit.loading.formats.tensorizer:TensorizerConverter",
        servers=ServerFlags(
            ("--load-format", "tensorizer"),
            None,
            "needs the model in vLLM's own tensorizer form: tensorize_vllm_model.py makes it",
        ),
    ),
)
