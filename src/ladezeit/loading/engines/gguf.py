"""The engine `gguf`: `from_pretrained` with a `gguf_file`, which was made from the checkpoint once.

transformers maps the file, widens each tensor to float32 on the CPU, and narrows it to the dtype that was asked for;
experts stay float32 until they are assigned. The config is the checkpoint's own (what a GGUF says of one is less), and
so is the generation config, which such a load leaves out. See
https://huggingface.co/docs/transformers/gguf.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ladezeit.config import DType, LoadingConfig
from ladezeit.config.engines import ServerFlags
from ladezeit.loading import instrumentation
from ladezeit.loading.base import EngineModel, EngineSpec, LoadRequest
from ladezeit.loading.build_model import finalize_model, refuse_incomplete
from ladezeit.loading.conversion import converted_files
from ladezeit.loading.engines.transformers import from_pretrained
from ladezeit.model.tensors import fault_in_pages
from ladezeit.timing.clock import Clock


@dataclass
class GgufLoading(LoadingConfig):
    """Arguments of a load through `from_pretrained` from a GGUF file, onto the run's one device."""

    engine: str = "gguf"


#: The loader's own reading, inside of the steps that all loads share.
_DEQUANTIZE = instrumentation.Hook(
    "transformers.modeling_gguf_pytorch_utils", "load_gguf_checkpoint", "load/dequantise"
)


class GgufEngine:
    """Loads the converted file onto one device, in the dtype that was asked for."""

    def prepare(self, request: LoadRequest) -> None:
        """Check that the converted file is whole."""
        converted_files(request)

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        """See `Engine.load`.

        Raises:
            LoadError: a weight is missing, unexpected or of another shape.
        """
        from transformers import AutoConfig

        (path,) = converted_files(request)
        folder = str(request.checkpoint.folder)
        asked = request.loading.dtype
        arguments: dict[str, Any] = {
            "dtype": request.checkpoint.dtype if asked is DType.auto else asked.value,
            "device_map": {"": request.device},
            "gguf_file": str(path),
        }
        with ExitStack() as stack:
            with clock.span("load/config"):
                config = AutoConfig.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=request.trust_remote_code
                )
            if clock.detail:
                instrumentation.install_hook(stack, _DEQUANTIZE, clock)
            loaded = from_pretrained(request, clock, config=config, **arguments, **_dequantized())
        loaded.effective["arguments"].update(config=folder, **dict.fromkeys(_dequantized(), "dequantize"))
        refuse_incomplete(loaded)
        # The library notes that this file needed no renames, and would save experts under the model's own names.
        loaded.model._weight_conversions = None
        with clock.span("load/generation_config"):
            finalize_model(loaded.model, folder)
        with clock.span("load/touch"):
            loaded.effective["touched_bytes"] = fault_in_pages(loaded.model)
        loaded.effective["engine"] = f"transformers {version('transformers')}, gguf {version('gguf')}"
        return loaded


def _dequantized() -> dict[str, Any]:
    """Return what makes newer versions unpack every weight, as older ones do without being told."""
    import transformers

    known = hasattr(transformers, "GgufConfig")
    return {"quantization_config": transformers.GgufConfig(dequantize=True)} if known else {}


_FLAGS = ("--load-format", "gguf")

ENGINES = (
    EngineSpec(
        name="gguf",
        arguments=GgufLoading,
        make=GgufEngine,
        packages=("gguf",),
        converter="ladezeit.loading.formats.gguf:GgufConverter",
        servers=ServerFlags(_FLAGS, _FLAGS, "give the .gguf file as the model"),
    ),
)
