"""What is quantized in a model, and what its quantizer should have quantized, read off the model itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ladezeit.config import LoadingConfig, TransformersLoading
from ladezeit.errors import CombinationError

BITSANDBYTES = "bitsandbytes"
TORCHAO = "torchao"

#: Stands for whatever scheme a checkpoint was quantized with before it was written.
CHECKPOINTS_OWN = "the checkpoint's own"

_MOST_NAMED = 10


@dataclass(frozen=True)
class Scheme:
    """What a quantizer is asked to make of weights; plain data by `dataclasses.asdict`.

    `library` is the name of its package. `quant_type` and `double` are bitsandbytes' 4 bit's. `threshold` is its 8
    bit's for activations: it changes what is computed, and no code.
    """

    library: str
    bits: int
    quant_type: str | None = None
    double: bool = False
    threshold: float | None = None

    @property
    def words(self) -> str:
        """The scheme in the words of `scheme_of`."""
        if self.library == TORCHAO:
            return "torchao int8 weight-only"
        return "bitsandbytes 8 bit" if self.bits == 8 else _four_bit(str(self.quant_type), self.double)


@dataclass
class QuantizedLoading(TransformersLoading):
    """A load that quantizes on its way; the library may choose a device of its own where no `device_map` is given."""

    device_map: Any = "device"

    @property
    def scheme(self) -> Scheme:
        """What its quantizer makes of weights."""
        raise NotImplementedError

    @property
    def item_bytes(self) -> float:
        """The least: 4 bit and a scale for 64 elements, of 4 bytes or of one; 8 bit and next to nothing."""
        if self.scheme.bits == 8:
            return 1.0
        return 0.5 + (1 if self.scheme.double else 4) / 64

    def check_arguments(self) -> None:
        """Refuse what does not go with quantizing on the way; raises `CombinationError`."""
        if self.device_map is None:
            raise CombinationError(
                f"loading.device_map=null with loading.engine={self.engine} leaves the device to the library, which "
                f"takes a GPU where it finds one. Use device, a strategy or a mapping"
            )
        if self.async_load is not None:
            raise CombinationError(
                f"loading.async_load was given with loading.engine={self.engine}, which reads one tensor after "
                f"another, so that only one is in memory unquantized. Leave it out"
            )
        if not self.disable_cpu_offload:
            raise CombinationError(
                f"loading.disable_cpu_offload=false was given with loading.engine={self.engine}: what is offloaded is "
                f"not quantized, or cannot be verified to be. Leave it out, or use loading=device_map_auto"
            )


def loading_scheme(loading: LoadingConfig) -> Scheme | None:
    """Return the scheme that `loading` asks for; None where it asks for none."""
    return loading.scheme if isinstance(loading, QuantizedLoading) else None


def scheme_asked(loading: LoadingConfig) -> str | None:
    """Return the scheme that `loading` asks for, in the words of `scheme_of`; None where it asks for none."""
    asked = loading_scheme(loading)
    return None if asked is None else asked.words


def quantization_config(requested: Scheme, dtype: str) -> Any:
    """Return transformers' config of the scheme; `dtype` (torch's name) is what products are computed in."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if requested.library == TORCHAO:
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if requested.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=requested.threshold)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=requested.quant_type,
        bnb_4bit_use_double_quant=requested.double,
        bnb_4bit_compute_dtype=dtype,  # the library's default is float32, whatever the weights were
    )


def scheme_of(tensor: Any) -> str | None:
    """Return how `tensor` is quantized; None where it is not, whatever its class promises."""
    kind = type(tensor)
    if kind.__module__.startswith("bitsandbytes."):
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            return _four_bit(state.quant_type, state.nested)
        return "bitsandbytes 8 bit" if str(tensor.dtype) == "torch.int8" else None
    if kind.__module__.startswith("torchao."):
        weight_only = kind.__name__ == "Int8Tensor" and tensor.act_quant_kwargs is None
        return "torchao int8 weight-only" if weight_only else f"torchao {kind.__name__}"
    return None


def dequantized_dtype(tensor: Any) -> str | None:
    """Return torch's name of the dtype that a quantized tensor computes in; None where it follows its input."""
    state = getattr(tensor, "quant_state", None)
    found = state.dtype if state is not None else tensor.dtype
    return str(found).removeprefix("torch.") if found.is_floating_point else None


def quantizer_rule(model: Any) -> Callable[[str, Any], bool]:
    """Return whether the model's quantizer takes the weight of a module, given its path and itself.

    The quantizer's own list of what it leaves out decides (``modules_to_not_convert``: the head, embeddings, what the
    model class keeps), not whether the module was replaced: that is what has to be found out. See
    ``replace_with_bnb_linear`` and ``TorchAoHfQuantizer.param_needs_quantization`` in transformers.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    return (lambda path, module: False) if quantizer is None else rule_of(quantizer)


def rule_of(quantizer: Any) -> Callable[[str, Any], bool]:
    """Return `quantizer_rule` of a model with this quantizer of transformers, whose `modules_to_not_convert` is set."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    left_out = getattr(quantizer, "modules_to_not_convert", None) or []

    def by_bitsandbytes(path: str, module: Any) -> bool:
        replaced = type(module).__module__.startswith("bitsandbytes.")
        return (type(module) in (Linear, Conv1D) or replaced) and bool(should_convert_module(path, left_out))

    def by_torchao(path: str, module: Any) -> bool:
        return isinstance(module, Linear) and bool(should_convert_module(f"{path}.weight", left_out))

    library = type(quantizer).__module__.rpartition(".")[2]
    known = {"quantizer_torchao": by_torchao}.get(library)
    return known or (by_bitsandbytes if "bnb" in library else lambda path, module: False)


@dataclass
class Survey:
    """What is quantized in a model: modules and elements, and what was kept as it is in the checkpoint.

    `kept` names modules with a kept tensor of two or more dimensions; vectors (norms, biases) only count as elements.
    """

    schemes: set[str] = field(default_factory=set)
    modules: int = 0
    elements: int = 0
    kept_elements: int = 0
    kept: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the record of what was effective."""
        return {
            "scheme": ", ".join(sorted(self.schemes)),
            "quantised_modules": self.modules,
            "quantised_share": round(self.elements / max(1, self.elements + self.kept_elements), 4),
            "kept_modules": len(self.kept),
            "kept": self.kept[:_MOST_NAMED],
        }


def survey_quantization(model: Any) -> Survey:
    """Look through `model`, each tensor once."""
    found = Survey()
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = [tensor for tensor in module._parameters.values() if tensor is not None]
        quantized = [tensor for tensor in own if scheme_of(tensor) is not None]
        plain = [tensor for tensor in own if scheme_of(tensor) is None]
        found.schemes.update(str(scheme_of(tensor)) for tensor in quantized)
        found.modules += bool(quantized)
        found.elements += sum(_elements(tensor) for tensor in quantized)
        found.kept_elements += sum(tensor.numel() for tensor in plain if id(tensor) not in seen)
        seen.update(map(id, own))
        if any(tensor.dim() > 1 for tensor in plain):
            found.kept.append(path)
    return found


def _elements(tensor: Any) -> int:
    state = getattr(tensor, "quant_state", None)  # two of 4 bit share a byte: the tensor's own shape says less
    return int(state.shape.numel() if state is not None else tensor.numel())


def _four_bit(quant_type: str, double: bool) -> str:
    return f"bitsandbytes 4 bit {quant_type}{' double' if double else ''}"
