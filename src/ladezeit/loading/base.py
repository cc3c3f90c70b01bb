"""The protocol between a loading method and everything around it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol

from typing_extensions import TypeVar

from ladezeit.checkpoint.safetensors_header import TensorEntry
from ladezeit.config import LoadingConfig
from ladezeit.config.engines import EngineFacts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ladezeit.checkpoint.resolve import Checkpoint
    from ladezeit.timing.clock import Clock


#: The class of an engine's own arguments: each engine is handed its own, and need not ask which they are.
LoadingT = TypeVar("LoadingT", bound=LoadingConfig)
LoadingT_co = TypeVar("LoadingT_co", bound=LoadingConfig, default=LoadingConfig, covariant=True)
LoadingT_contra = TypeVar("LoadingT_contra", bound=LoadingConfig, default=LoadingConfig, contravariant=True)

#: Told bytes done, bytes in all, and seconds since the reading began; from any thread, one call at a time. It must
#: return at once.
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class LoadRequest(Generic[LoadingT_co]):
    """What to load and where to.

    `device` is a torch device name (``cpu``, ``cuda:0``); `attn_implementation` None leaves the library's choice;
    `scratch` is an empty folder that outlives the load (for offloaded weights). `weight_mapping` says which tensors the
    model keeps as one and in which dtype, for engines that can put them so at once; `progress` is told how far the
    reading is, by engines that know. `conversion` is the checkpoint as its engine reads it, where it is not read as it
    lies.
    """

    checkpoint: "Checkpoint"
    loading: LoadingT_co
    device: str
    scratch: Path
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    weight_mapping: "WeightMapping | None" = None
    progress: Progress | None = None
    conversion: "Conversion | None" = None


@dataclass
class EngineModel:
    """A `transformers` model in memory and what its load was found to have done.

    `device_map` is the resolved placement (module to device) where there was one. `effective` says what really
    happened, whatever was asked for. Key lists hold parameter names of the model. `lent_bytes` are the sizes of the
    blocks of memory that an engine's tensors lay in before it was closed.
    """

    model: Any
    device_map: dict[str, str] | None = None
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[str] = field(default_factory=list)
    effective: dict[str, Any] = field(default_factory=dict)
    lent_bytes: list[int] = field(default_factory=list)


class Engine(Protocol[LoadingT_contra]):
    """Code that brings a checkpoint's tensors into memory as a `transformers` model."""

    def prepare(self, request: LoadRequest[LoadingT_contra]) -> None:
        """Make ready what must not be on the clock (a conversion, a settings file); called once before `load`."""
        ...

    def load(self, request: LoadRequest[LoadingT_contra], clock: "Clock") -> EngineModel:
        """Load the model inside the caller's span ``load``, opening spans ``load/<phase>`` for its own phases.

        Raises:
            LoadError: the result would not be what was asked for.
        """
        ...


@dataclass
class LoadedTensors:
    """All tensors of a checkpoint, by their names in it, on the run's device and in the checkpoint's dtype.

    An engine may give them out while their bytes still arrive: `by_name` is what there is to see at once (names,
    shapes, dtypes, memory), `get_tensor` waits for the values of one, `tensors` for all, and both raise what the
    reading failed with. Who makes something of them calls `wait` before it is passed on: an error may come
    after the last byte.
    Where `mapped`, the request's weight mapping was carried out: merged tensors are there under the model's names in
    place of their parts, and casts are done. `touched`: every page was faulted in or written already. `borrowed` says
    that their memory is the engine's and not valid once it is closed: who keeps them copies them. `effective` says
    what the engine really did: threads, direct or buffered I/O, fallbacks, bytes read, pinned bytes; it is complete
    when `tensors` is.
    """

    by_name: "dict[str, Tensor]"
    borrowed: bool = False
    mapped: bool = False
    touched: bool = False
    effective: dict[str, Any] = field(default_factory=dict)
    wait: Callable[[], None] = lambda: None
    wait_for: Callable[[str], None] | None = None

    @property
    def tensors(self) -> "dict[str, Tensor]":
        """All tensors with their values."""
        self.wait()
        return self.by_name

    def get_tensor(self, name: str) -> "Tensor":
        """Return one tensor with its values; others may still be under way where the engine tells them apart."""
        if self.wait_for is None:
            self.wait()
        else:
            self.wait_for(name)
        return self.by_name[name]


class LazyStateDict(Mapping[str, "LazySlice"]):
    """Loaded tensors as a state dict: names are there at once, and a tensor waits where its values are asked for."""

    def __init__(self, loaded: LoadedTensors) -> None:
        self._loaded = loaded

    def __getitem__(self, name: str) -> "LazySlice":
        return LazySlice(self._loaded, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded.by_name)

    def __len__(self) -> int:
        return len(self._loaded.by_name)


class LazySlice:
    """A tensor of a checkpoint that may still be under way, in the form that `from_pretrained` gets from safetensors.

    Of what safetensors calls a slice the library takes the values with ``[...]``, at the moment when it needs them.
    Whoever asks for anything else gets it from the tensor itself, and waits for that as well.
    """

    __slots__ = ("_loaded", "_name")

    def __init__(self, loaded: LoadedTensors, name: str) -> None:
        self._loaded, self._name = loaded, name

    def __getitem__(self, index: Any) -> "Tensor":
        return self._loaded.get_tensor(self._name)[index]

    def __getattr__(self, requested: str) -> Any:
        return getattr(self._loaded.get_tensor(self._name), requested)


class TensorEngine(Protocol[LoadingT_contra]):
    """Code that brings a checkpoint's tensors onto one device and leaves it to others to make a model of them."""

    def prepare(self, request: LoadRequest[LoadingT_contra]) -> None:
        """Make ready what must not be on the clock; called once before `open`."""
        ...

    def open(self, request: LoadRequest[LoadingT_contra], clock: "Clock") -> AbstractContextManager[LoadedTensors]:
        """Read all tensors inside spans ``load/<phase>``; leaving the context gives the engine's buffers back.

        Raises:
            LoadError: not every tensor of the checkpoint could be brought to the device as it is in the file.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class EngineSpec(EngineFacts, Generic[LoadingT]):
    """An engine of this program: what is known of it, and how it is made.

    The file that holds the engine holds this too, in its tuple ``ENGINES`` (see `ladezeit.config.engines`).
    """

    arguments: type[LoadingT]
    make: Callable[[], Engine[LoadingT] | TensorEngine[LoadingT]]

    @property
    def yields_tensors(self) -> bool:
        """Whether it is a `TensorEngine`, of whose tensors `ladezeit.loading.build_model` makes a model."""
        return hasattr(self.make(), "open")


@dataclass(frozen=True)
class Conversion:
    """A checkpoint in another format: the files that the engine reads, their bytes, and how long making them took.

    `seconds` is the time of the conversion whenever it was; no load's clock has it.
    """

    folder: Path
    files: tuple[Path, ...]
    file_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `from_json`, ready for JSON."""
        files = [path.name for path in self.files]
        return {"folder": str(self.folder), "files": files, "file_bytes": self.file_bytes, "seconds": self.seconds}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Conversion":
        """Rebuild what `to_json` returned, without touching the disk."""
        folder = Path(plain["folder"])
        return cls(folder, tuple(folder / name for name in plain["files"]), plain["file_bytes"], plain["seconds"])


@dataclass(frozen=True)
class Slice:
    """A tensor of the checkpoint inside a merged one, where it starts at element `start`."""

    entry: TensorEntry
    start: int


@dataclass(frozen=True)
class FusedParameter:
    """A parameter of the model that many tensors of the checkpoint make up, each of them a contiguous piece of it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    slices: tuple[Slice, ...]
    #: Names of the parts as the library lists them: one list for each tensor that it concatenates.
    columns: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class WeightMapping:
    """What to do with a checkpoint's tensors on their way to a model.

    `dtypes` names, for tensors that are to be cast, the dtype they become; `conversions` are the library's transforms
    that were applied, which the model needs to be saved again in the checkpoint's own layout; `reason` tells why
    nothing was arranged where that was wanted.
    """

    fused: tuple[FusedParameter, ...] = ()
    dtypes: "dict[str, torch.dtype]" = field(default_factory=dict)
    conversions: tuple[Any, ...] = ()
    reason: str | None = None

    def describe(self) -> dict[str, Any]:
        """Return what was arranged, for the result: counts of tensors, and why nothing was."""
        return {
            "merged": len(self.fused),
            "merged_from": sum(len(one.slices) for one in self.fused),
            "cast": len(self.dtypes),
            "left_to_the_library": self.reason,
        }
