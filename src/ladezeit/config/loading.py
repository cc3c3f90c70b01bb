"""The typed schema of the group `loading`: the arguments of each engine."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING

#: Placements that are left to accelerate.
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


class DType(Enum):
    """Element type of the loaded weights; `auto` keeps the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class ModuleWalk(Enum):
    """What a manager does to each tensor below each module: ask where it is, or copy it to the host and look at it."""

    meta = "meta"
    values = "values"


class FourBitType(Enum):
    """Code book of bitsandbytes' 4 bit: `nf4` for normally distributed weights, `fp4` for small floats."""

    nf4 = "nf4"
    fp4 = "fp4"


class Reading(Enum):
    """How our own reader gets at bytes: each part by whether it is in the page cache, or all alike."""

    by_residency = "by_residency"
    direct = "direct"
    buffered = "buffered"
    mapped = "mapped"


class Readers(Enum):
    """Whose threads read for a GPU: compiled ones where they can (what is cast they leave to Python's), or one kind."""

    auto = "auto"
    native = "native"
    python = "python"


@dataclass
class LoadingConfig:
    """What all loading methods share; `engine` names the code that loads."""

    name: str = MISSING
    engine: str = MISSING
    dtype: DType = DType.auto
    disable_cpu_offload: bool = True


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


@dataclass
class AccelerateLoading(TransformersLoading):
    """Arguments of a load through `accelerate.load_checkpoint_and_dispatch`, which needs a `device_map`."""

    engine: str = "accelerate"
    device_map: Any = "device"


@dataclass
class LegacyManagerLoading(TransformersLoading):
    """The origin case's manager as it was before: no rule is enforced, every module is walked after the load."""

    engine: str = "legacy_manager"
    settings_reads: int = 2
    walk: ModuleWalk = ModuleWalk.meta


@dataclass
class QuantizedLoading(TransformersLoading):
    """A load that quantizes on its way; the library may choose a device of its own where no `device_map` is given."""

    device_map: Any = "device"


@dataclass
class Bitsandbytes8bitLoading(QuantizedLoading):
    """bitsandbytes' LLM.int8(): where an input is beyond `threshold`, its column is computed in float; 0 for none."""

    engine: str = "bitsandbytes_8bit"
    threshold: float = 6.0


@dataclass
class Bitsandbytes4bitLoading(QuantizedLoading):
    """bitsandbytes' 4 bit in blocks of 64; `double_quant` quantizes the blocks' scales too."""

    engine: str = "bitsandbytes_4bit"
    quant_type: FourBitType = FourBitType.nf4
    double_quant: bool = False


@dataclass
class TorchaoInt8Loading(QuantizedLoading):
    """torchao's symmetric int8 weights with a scale a row; activations stay as they are."""

    engine: str = "torchao_int8"


@dataclass
class TensorParallelLoading(LoadingConfig):
    """Arguments of a load over several processes: each of `ranks` holds its share of every split weight."""

    engine: str = "tensor_parallel"
    ranks: int = 2


@dataclass
class TensorLoading(LoadingConfig):
    """Arguments of an engine that yields tensors on the run's one device; `threads` None leaves its own choice."""

    threads: Optional[int] = None


@dataclass
class FastsafetensorsLoading(TensorLoading):
    """Arguments of fastsafetensors; `direct` forces O_DIRECT on or off, `buffer_bytes` sizes its bounce buffers."""

    engine: str = "fastsafetensors"
    direct: Optional[bool] = None
    buffer_bytes: Optional[int] = None


@dataclass
class RunaiLoading(TensorLoading):
    """Arguments of the Run:ai Model Streamer; `buffer_bytes` bounds its ring of host buffers."""

    engine: str = "runai_streamer"
    buffer_bytes: Optional[int] = None


@dataclass
class InstanttensorLoading(TensorLoading):
    """Arguments of InstantTensor; `io_depth` is how many reads are in flight, `threads` counts where it uses any."""

    engine: str = "instanttensor"
    io_depth: Optional[int] = None


@dataclass
class TensorizerLoading(TensorLoading):
    """Arguments of tensorizer; `threads` read, `verify_hash` compares every tensor with the hashes in its file."""

    engine: str = "tensorizer"
    verify_hash: bool = False


@dataclass
class GgufLoading(LoadingConfig):
    """Arguments of a load through `from_pretrained` from a GGUF file, onto the run's one device."""

    engine: str = "gguf"


@dataclass
class StreamedLoading(TensorLoading):
    """Arguments of our own reader.

    `extent_bytes` is the most that goes through a buffer at once, a multiple of a page; where bytes stay in host
    memory, up to four times as much is read at once. `ring_bytes` bounds the pinned host memory on the way to a GPU.
    `reading` other than `by_residency` and `readers` other than `auto` are there to be compared with these.
    """

    engine: str = "streamed"
    extent_bytes: int = 8 * 2**20
    ring_bytes: int = 256 * 2**20
    reading: Reading = Reading.by_residency
    readers: Readers = Readers.auto


@dataclass
class AutoLoading(LoadingConfig):
    """No arguments: engine and arguments are chosen by what is found (see `ladezeit.loading.auto`)."""

    engine: str = "auto"


@dataclass
class TracedLoading(LoadingConfig):
    """A user's own load function: ``module:function`` or ``module:Class.method``, importable where the worker runs.

    It is given the checkpoint's folder and, by name, `arguments`.
    """

    engine: str = "traced"
    function: Optional[str] = None
    arguments: dict[str, Any] = field(default_factory=dict)
