"""The arguments that several engines share; an engine's own stand beside it, in `ladezeit.loading.engines`."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

from ladezeit.config.run import LoadingConfig

#: Placements that are left to accelerate.
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def at_least(least: float, default: Any) -> Any:
    """Return a dataclass field whose values, None apart, are refused below `least` (`compose.check_load_values`)."""
    return field(default=default, metadata={"least": least})


@dataclass
class TransformersLoading(LoadingConfig):
    """Arguments of a load through `from_pretrained`.

    `device_map` is None, a strategy (`auto`, `balanced`, `balanced_low_0`, `sequential`), a device, or a mapping from
    module to `device`, `cpu`, `disk`, `cuda:N` or a GPU's number; the word `device` stands for the run's device.
    `max_memory` maps `device`, `cpu` or a GPU's number to a size (`20GiB`) or a share of what that device has (`90%`);
    empty means no limit, and only a strategy takes any. With `disable_cpu_offload` a module on the disk, or in host
    memory on a GPU run, is an error; without it disk offload goes to a folder of the sample's own, in `offload_folder`
    where that is given, and is removed after the sample. `async_load` (the loader's threads) and `disable_mmap` (whole
    files read into memory) are the library's choice where they are None.
    """

    engine: str = "transformers"
    device_map: Any = None
    max_memory: dict[str, str] = field(default_factory=dict)
    offload_folder: Optional[str] = None
    move_to_device: bool = False
    async_load: Optional[bool] = None
    disable_mmap: Optional[bool] = None

    #: Whether a placement is checked: that its words mean something, and that what it offloads was allowed.
    checks_placement: ClassVar[bool] = True


@dataclass
class TensorLoading(LoadingConfig):
    """Arguments of an engine that yields tensors on the run's one device; `threads` None leaves its own choice."""

    threads: Optional[int] = at_least(1, None)
