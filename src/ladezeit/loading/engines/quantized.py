"""The engines `bitsandbytes_8bit`, `bitsandbytes_4bit` and `torchao_int8`: `from_pretrained` that quantizes on its way.

transformers reads one tensor after another in full, hands it to the library, and keeps what comes back. A library that
finds nothing to do says so in its log at most: here it is an error.
"""

from dataclasses import dataclass
from enum import Enum
from importlib import import_module

from ladezeit.config.engines import ServerFlags
from ladezeit.config.loading import at_least
from ladezeit.errors import LoadError, NotRunnableError
from ladezeit.loading import quantization
from ladezeit.loading.base import EngineModel, EngineSpec, LoadRequest
from ladezeit.loading.engines.transformers import check_known, finish_load, from_pretrained, placement_arguments
from ladezeit.loading.quantization import QuantizedLoading, Scheme
from ladezeit.timing.clock import Clock


class FourBitType(Enum):
    """Code book of bitsandbytes' 4 bit: `nf4` for normally distributed weights, `fp4` for small floats."""

    nf4 = "nf4"
    fp4 = "fp4"


@dataclass
class Bitsandbytes8bitLoading(QuantizedLoading):
    """bitsandbytes' LLM.int8(): where an input is beyond `threshold`, its column is computed in float; 0 for none."""

    engine: str = "bitsandbytes_8bit"
    threshold: float = at_least(0, 6.0)

    @property
    def scheme(self) -> Scheme:
        """What its quantizer makes of weights."""
        return Scheme(quantization.BITSANDBYTES, 8, threshold=self.threshold)


@dataclass
class Bitsandbytes4bitLoading(QuantizedLoading):
    """bitsandbytes' 4 bit in blocks of 64; `double_quant` quantizes the blocks' scales too."""

    engine: str = "bitsandbytes_4bit"
    quant_type: FourBitType = FourBitType.nf4
    double_quant: bool = False

    @property
    def scheme(self) -> Scheme:
        """What its quantizer makes of weights."""
        return Scheme(quantization.BITSANDBYTES, 4, self.quant_type.value, self.double_quant)


@dataclass
class TorchaoInt8Loading(QuantizedLoading):
    """torchao's symmetric int8 weights with a scale a row; activations stay as they are."""

    engine: str = "torchao_int8"

    @property
    def scheme(self) -> Scheme:
        """What its quantizer makes of weights."""
        return Scheme(quantization.TORCHAO, 8)


class QuantizedEngine:
    """Loads through `from_pretrained` with the `quantization_config` that the loading method stands for."""

    def prepare(self, request: LoadRequest[QuantizedLoading]) -> None:
        """Import the library, which is not loading; raises `NotRunnableError` where there is nothing left to do."""
        check_known(request.loading)
        already = request.checkpoint.config.get("quantization_config")
        if already is not None:
            method = already.get("quant_method", "unknown") if isinstance(already, dict) else "unknown"
            raise NotRunnableError(
                f"loading.engine={request.loading.engine} quantizes, and the checkpoint was quantized before it was "
                f"written (quant_method={method}): transformers would drop one of the two. Use loading=transformers"
            )
        for module in _modules(request.loading.scheme.library):
            import_module(module)

    def load(self, request: LoadRequest[QuantizedLoading], clock: Clock) -> EngineModel:
        """See `Engine.load`.

        Raises:
            LoadError: the library found nothing to quantize.
        """
        loading = request.loading
        arguments = placement_arguments(loading, request.device)
        arguments["quantization_config"] = quantization.quantization_config(loading.scheme, _dtype(request))
        loaded = from_pretrained(request, clock, **arguments)
        finish_load(loaded, request, clock)
        with clock.span("load/check"):
            found = quantization.survey_quantization(loaded.model)
        if not found.modules:
            raise LoadError(
                f"loading.engine={loading.engine} quantized nothing: {type(loaded.model).__name__} has no linear layer "
                f"that the library takes ({', '.join(found.kept[:3])} … were kept). Use loading=transformers"
            )
        loaded.effective["quantisation"] = found.to_dict()
        return loaded


def _modules(library: str) -> tuple[str, ...]:
    """Return what the load would import in its middle: the library, and transformers' own side of it."""
    if library == quantization.BITSANDBYTES:
        return ("bitsandbytes", "transformers.integrations.bitsandbytes")
    return ("torchao.quantization", "transformers.quantizers.quantizer_torchao", "transformers.integrations.torchao")


def _dtype(request: LoadRequest) -> str:
    asked = request.loading.dtype.value
    return request.checkpoint.dtype if asked == "auto" else asked


_BITSANDBYTES_ON_SERVERS = ("--load-format", "bitsandbytes", "--quantization", "bitsandbytes")

ENGINES = (
    EngineSpec(
        name="bitsandbytes_8bit",
        arguments=Bitsandbytes8bitLoading,
        make=QuantizedEngine,
        formats=("safetensors", "pickle"),
        packages=("bitsandbytes",),
        releases=("bitsandbytes>=0.50",),
    ),
    EngineSpec(
        name="bitsandbytes_4bit",
        arguments=Bitsandbytes4bitLoading,
        make=QuantizedEngine,
        formats=("safetensors", "pickle"),
        packages=("bitsandbytes",),
        releases=("bitsandbytes>=0.50",),
        servers=ServerFlags(_BITSANDBYTES_ON_SERVERS, _BITSANDBYTES_ON_SERVERS),
    ),
    EngineSpec(
        name="torchao_int8",
        arguments=TorchaoInt8Loading,
        make=QuantizedEngine,
        formats=("safetensors", "pickle"),
        packages=("torchao",),
        releases=("torchao>=0.18",),
    ),
)
