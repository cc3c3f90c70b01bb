"""What the library's own quantiser makes of weights that are proven already: the measure for quantised loads.

Each weight is given to the library's public function by itself. That is not the road of a load, on which transformers
reads, casts, quantises and attaches: what it puts together wrongly shows.
"""

from typing import TYPE_CHECKING, Any

from ladezeit.errors import CheckpointError
from ladezeit.loading.parts import named_parts, state_parts
from ladezeit.loading.quantisation import TORCHAO, Scheme, quantization_config, rule_of
from ladezeit.validation.content.digest import digests
from ladezeit.validation.content.inventory import QUANTISED, part_name
from ladezeit.validation.content.manifest import Entry

if TYPE_CHECKING:
    from torch import Tensor

#: What transformers quantises to 4 bit with, in elements that share a scale.
_BLOCK = 64
_MOST_NAMED = 5


def taken(model: Any, scheme: Scheme, dtype: str) -> list[str]:
    """Return the names of the weights of a plain `model` that the scheme's quantiser takes, by its own list."""
    from transformers.quantizers import AutoHfQuantizer

    quantiser = AutoHfQuantizer.from_config(quantization_config(scheme, dtype), pre_quantized=False)
    left_out = quantiser.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    quantiser.modules_to_not_convert = left_out
    takes = rule_of(quantiser)
    return [f"{path}.weight" for path, module in model.named_modules() if takes(path, module)]


def quantised_entries(model: Any, scheme: Scheme, dtype: str, device: str) -> dict[str, list[tuple[str, Entry]]]:
    """Return what each weight that is taken must consist of: the entries of its parts with their names.

    Args:
        model: a plain one, proven; its weights are of `dtype`.
        scheme: what is asked for.
        dtype: torch's name.
        device: where the load quantises; another device's kernels may round differently.

    Raises:
        CheckpointError: the library makes something else of the same weight the second time.
    """
    made = {}
    unsteady = []
    for name in taken(model, scheme, dtype):
        weight = _as_linear(model, name)
        parts = quantise(weight, scheme, device)
        found = digests(parts)
        if digests(quantise(weight, scheme, device)) != found:
            unsteady.append(name)
        made[name] = [
            (part_name(name, part), Entry(found[part], _dtype(tensor), tuple(tensor.shape), QUANTISED))
            for part, tensor in parts.items()
        ]
    if unsteady:
        raise CheckpointError(
            f"{scheme.library} makes other codes of the same weight each time ({len(unsteady)} of {len(made)}: "
            f"{', '.join(unsteady[:_MOST_NAMED])}): there is no content to prove them by. Use validation=logits, which "
            f"measures how far two loads are apart"
        )
    return made


def quantise(weight: "Tensor", scheme: Scheme, device: str) -> "dict[str, Tensor]":
    """Return the parts that the library makes of a weight (rows by columns), by their names in `named_parts`."""
    import torch

    here = weight.detach().to(device).contiguous()
    if scheme.library == TORCHAO:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        linear = torch.nn.Linear(here.shape[1], here.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(here, requires_grad=False)
        quantize_(linear, Int8WeightOnlyConfig())
        return dict(named_parts(linear.weight))
    from bitsandbytes import functional

    if scheme.bits == 8:
        codes, scales, _ = functional.int8_vectorwise_quant(here.to(torch.float16))
        return {"": codes, "SCB": scales}
    codes, state = functional.quantize_4bit(
        here, blocksize=_BLOCK, compress_statistics=scheme.double, quant_type=scheme.quant_type
    )
    return {"": codes, **dict(state_parts(state))}


def _as_linear(model: Any, name: str) -> "Tensor":
    """Return a weight as a linear layer has it; GPT-2's own class keeps it the other way round."""
    from transformers.pytorch_utils import Conv1D

    weight: Tensor = model.get_parameter(name)
    return weight.T if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else weight


def _dtype(tensor: "Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")
