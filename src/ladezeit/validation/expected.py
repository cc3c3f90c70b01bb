"""What a validation is given: what a model was asked to be."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ladezeit.validation.logits import Reference
    from ladezeit.validation.manifest import Manifest


@dataclass(frozen=True)
class Expected:
    """What the load was asked for.

    `device` is a torch device name with its index (``cpu``, ``cuda:0``), `dtype` a torch dtype's name (``bfloat16``),
    never ``auto``. `single_device`: one explicit device was asked for; `generation_config`: what the checkpoint's
    generation_config.json says (`stored_generation_config`), which the model must have taken up; None where it has
    none. `quantization`: the scheme asked for, in the words of `ladezeit.loading.quantization.scheme_of`; None for
    none. `manifest`: what every tensor must hold, for the levels that look at contents; `reference`: what the model
    must generate, for those that run the model. `rank`: which of the ranks this process is, where weights are split
    over several. `model_class`: the class that `from_pretrained` would have made, None where that is not known;
    `adapter`: it would have added one.
    """

    device: str
    dtype: str
    single_device: bool
    offload_allowed: bool
    generation_config: dict[str, Any] | None = None
    quantization: str | None = None
    manifest: "Manifest | None" = None
    reference: "Reference | None" = None
    rank: int | None = None
    model_class: type | None = None
    adapter: bool = False
