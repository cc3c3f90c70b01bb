"""How much memory the models of a process may take, on its GPUs together and on the host, and how much they take.

A model is charged from before its load, by the bytes that its checkpoint's headers promise, until its last tensor is
gone, whoever held it: what was given up but is still held by somebody stays on the account.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

from ladezeit.errors import ConfigError, NotRunnableError

_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class BudgetError(NotRunnableError):
    """A model does not fit into the memory that the manager may use."""


@dataclass(frozen=True)
class Bytes:
    """Memory of a model: on all GPUs together, and on the host."""

    gpu: int = 0
    host: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.gpu + other.gpu, self.host + other.host)

    def __sub__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.gpu - other.gpu, self.host - other.host)

    def __str__(self) -> str:
        parts = [
            f"{in_words(size)} of {where} memory" for where, size in (("GPU", self.gpu), ("host", self.host)) if size
        ]
        return " and ".join(parts) or "no memory"


#: No memory at all.
NOTHING = Bytes()


class Machine(Protocol):
    """What is free right now, where no budget was given."""

    def free(self) -> Bytes:
        """Return what could still be had on the GPUs that torch sees, and on the host."""
        ...


class ThisMachine:
    """The machine that this process runs on."""

    def free(self) -> Bytes:
        """See `Machine.free`; a process that has no CUDA yet is not made to open one."""
        from ladezeit.measure.limits import available_memory_bytes

        return Bytes(gpu=_free_gpu_bytes(), host=available_memory_bytes())


@dataclass(frozen=True)
class Account:
    """What the manager holds on one moment: charges by model, and the limits (None: what the machine has)."""

    charges: dict[str, Bytes]
    gpu_limit: int | None
    host_limit: int | None

    @property
    def used(self) -> Bytes:
        """The sum of all charges."""
        return sum(self.charges.values(), NOTHING)


class Budget:
    """Charges against limits; not locked: the manager asks under its own lock."""

    def __init__(self, gpu: int | str | None, host: int | str | None, machine: Machine | None = None) -> None:
        self._account = Account({}, size_bytes(gpu, "gpu_budget"), size_bytes(host, "host_budget"))
        self._machine = machine or ThisMachine()

    @property
    def account(self) -> Account:
        """The account as it is; what is returned never changes."""
        return self._account

    def charge(self, key: str, size: Bytes) -> None:
        """Put `key` on the account with `size`, in place of what it had there."""
        self._account = replace(self._account, charges={**self._account.charges, key: size})

    def release(self, key: str) -> None:
        """Take `key` off the account; nothing happens where it is not there."""
        charges = {name: size for name, size in self._account.charges.items() if name != key}
        self._account = replace(self._account, charges=charges)

    def lacking(self, need: Bytes) -> Bytes:
        """Return how much has to go before `need` fits, next to all that is charged; no bytes where it fits."""
        used, free = self._account.used, self._free()
        return Bytes(
            gpu=max(0, _excess(need.gpu, used.gpu, self._account.gpu_limit, free.gpu)),
            host=max(0, _excess(need.host, used.host, self._account.host_limit, free.host)),
        )

    def overdrawn(self) -> Bytes:
        """Return by how much the charges exceed the limits."""
        used = self._account.used
        gpu, host = self._account.gpu_limit, self._account.host_limit
        return Bytes(
            gpu=0 if gpu is None else max(0, used.gpu - gpu), host=0 if host is None else max(0, used.host - host)
        )

    def check_can_ever_fit(self, name: str, need: Bytes) -> None:
        """Raise `BudgetError` where `need` alone is more than a limit: unloading everything would not help."""
        limits = (("GPU", need.gpu, self._account.gpu_limit), ("host", need.host, self._account.host_limit))
        for where, size, limit in limits:
            if limit is not None and size > limit:
                raise BudgetError(
                    f"{name} needs {in_words(size)} of {where} memory, the {where.lower()}_budget is "
                    f"{in_words(limit)}: nothing was read. Raise the budget, or load it with a smaller dtype"
                )

    def _free(self) -> Bytes:
        unlimited = self._account.gpu_limit is None or self._account.host_limit is None
        return self._machine.free() if unlimited else NOTHING


def _excess(need: int, used: int, limit: int | None, free: int) -> int:
    if need == 0:
        return 0
    return need - free if limit is None else used + need - limit


def size_bytes(size: int | str | None, what: str) -> int | None:
    """Return a budget in bytes from a number or a text such as ``20GiB``; None stays None.

    Raises:
        ConfigError: `what` is not a size.
    """
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and size >= 0):
        return size
    text = str(size).strip().upper()
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    try:
        number = float(text.removesuffix(unit))
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{what}={size!r} is no size: give bytes, or a text such as '20GiB'")
    return int(number * _UNITS[unit or "B"])


def in_words(size: int) -> str:
    """Return bytes as a person reads them: ``13.8 GiB``, ``2.6 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def bytes_of(model: Any) -> Bytes:
    """Return the memory that the parameters and buffers of a model take, each byte once; not what is on meta."""
    from ladezeit.loading.parts import weights_bytes_by_device

    sizes = weights_bytes_by_device(model)
    gpu = sum(size for device, size in sizes.items() if device.startswith("cuda"))
    return Bytes(gpu=gpu, host=sum(sizes.values()) - gpu)


def _free_gpu_bytes() -> int:
    import torch

    from ladezeit.measure.devices import cuda_devices, gpu_memory_free_bytes, torch_has_cuda

    # The driver's management library is asked, not CUDA, which would open a context on every GPU to answer.
    free = sum(map(gpu_memory_free_bytes, cuda_devices())) if torch_has_cuda() else 0
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        every = range(torch.cuda.device_count())
        free += sum(torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index) for index in every)
    return free
