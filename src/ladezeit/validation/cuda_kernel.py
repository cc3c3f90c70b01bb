"""The compiled kernel of row and column sums on an NVIDIA GPU, where this machine has one that is right.

It is compiled once for each kind of GPU, in a fifth of a second, by NVIDIA's compiler for use at run time (NVRTC),
which torch brings along: no CUDA toolkit and no C compiler is needed. The cache folder keeps what was made. It is tried
on words of known sums before it is used; where there is none that is right, torch's operations give the same sums.
"""

import ctypes
import hashlib
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ladezeit.errors import OutOfMemoryError, ran_out_of_memory
from ladezeit.system.files import cache_folder, write_atomically
from ladezeit.system.fork import renew_after_fork
from ladezeit.validation.checksum import ROW_BYTES, ROW_WORDS, WORD_BYTES, make_multipliers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Words = np.ndarray[Any, np.dtype[np.uint64]]
    Numbers = np.ndarray[Any, np.dtype[np.int64]]


#: What `_sums.cu` says of a block.
BLOCK_ROWS, BLOCK_THREADS = 64, 256
#: A tensor's address, its bytes, where its row and its column sums begin, its first block: 64 bits each.
PART_WORDS = 5

#: What a kernel is tried on: where a part begins, which decides how it is read, its whole rows, the bytes behind them.
#: Parts of one block, at addresses of all kinds; parts of several blocks, read in both ways, the last of which is not
#: full, between others; and so many rows that their sums are summed again.
_TRIAL = (
    (0, 3, 21),
    (8, 3, 13),
    (5, BLOCK_ROWS + 6, 21),
    (16, 2, 0),
    (0, ROW_WORDS + 6, 0),
    (5, 2, 0),
    (0, BLOCK_ROWS, 0),
)

_SOURCE = "_sums.cu"
_FUNCTION = b"ladezeit_sums"
_FOLDER = "kernels"
#: CUDA_ERROR_OUT_OF_MEMORY (cuda.h) and NVRTC_ERROR_OUT_OF_MEMORY (nvrtc.h).
_GPU_FULL, _COMPILER_FULL = 2, 1
_HASH_BYTES = hashlib.sha256().digest_size
_LOCK = threading.Lock()
renew_after_fork(_LOCK)
_made: "dict[torch.device, DeviceKernel | None]" = {}


class DeviceKernel:
    """The kernel in the context of one device.

    Args:
        driver: the CUDA driver's library.
        image: what `compile_kernel` returned for that device.

    Raises:
        RuntimeError: the driver refuses the image.
    """

    def __init__(self, driver: ctypes.CDLL, image: bytes) -> None:
        module, self._function, self._driver = ctypes.c_void_p(), ctypes.c_void_p(), driver
        _check(driver.cuModuleLoadData(ctypes.byref(module), image))
        _check(driver.cuModuleGetFunction(ctypes.byref(self._function), module, _FUNCTION))

    def launch_kernel(self, parts: "Tensor", blocks: int, factors: "Tensor", sums: "Tensor", stream: int = 0) -> None:
        """Begin to write the row sums of all parts into `sums`, and to add their column sums to what is there.

        All tensors are int64 on the device and stay alive until the stream has passed the kernel.

        Args:
            parts: (n, `PART_WORDS`), by their first block; see there.
            blocks: of all parts together, each of which has one for every `BLOCK_ROWS` rows.
            factors: the multipliers, (`ROW_WORDS`,).
            sums: where row and column sums go.
            stream: the CUDA stream's handle.

        Raises:
            RuntimeError: the driver refuses it.
        """
        values = (
            ctypes.c_void_p(parts.data_ptr()),
            ctypes.c_int(len(parts)),
            ctypes.c_void_p(factors.data_ptr()),
            ctypes.c_void_p(sums.data_ptr()),
        )
        arguments = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        grid, block, shared_bytes = (blocks, 1, 1), (BLOCK_THREADS, 1, 1), 0
        handle = ctypes.c_void_p(stream)
        _check(self._driver.cuLaunchKernel(self._function, *grid, *block, shared_bytes, handle, arguments, None))


def device_kernel(device: "torch.device") -> DeviceKernel | None:
    """Return the kernel for a device, made where it was not yet; None where there is none that is right.

    A process's first call for a device takes some hundredths of a second, a machine's a fifth.
    """
    with _LOCK:
        if device not in _made:
            _made[device] = _make(device)
        return _made[device]


def compile_kernel(source: bytes, architecture: str, compiler: ctypes.CDLL) -> bytes:
    """Return CUDA source as machine code for an architecture (``sm_90``); raises `RuntimeError` where that fails."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _check(compiler.nvrtcCreateProgram(ctypes.byref(program), source, _SOURCE.encode(), 0, None, None), _COMPILER_FULL)
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
        _check(compiler.nvrtcCompileProgram(program, len(options), options), _COMPILER_FULL)
        _check(compiler.nvrtcGetCUBINSize(program, ctypes.byref(size)), _COMPILER_FULL)
        image = ctypes.create_string_buffer(size.value)
        _check(compiler.nvrtcGetCUBIN(program, image), _COMPILER_FULL)
        return image.raw
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


def kernel_source() -> bytes:
    """Return the kernel's source."""
    return resources.files(__package__).joinpath(_SOURCE).read_bytes()


def is_right(kernel: DeviceKernel, device: "torch.device") -> bool:
    """Say whether a kernel finds the sums of words whose sums are known: see `_TRIAL`."""
    import torch

    ends = [begin + rows * ROW_BYTES + more for begin, rows, more in _TRIAL]
    data = np.random.default_rng(0).bytes(max(ends))
    there = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    parts = [slice(begin, end) for (begin, _, _), end in zip(_TRIAL, ends, strict=True)]
    found = FusedSums(kernel, [there[part] for part in parts]).get_results()
    return all(
        np.array_equal(ours, known)
        for part, sums in zip(parts, found, strict=True)
        for ours, known in zip(sums, _known(np.frombuffer(data[part], dtype=np.uint8)), strict=True)
    )


def _known(data: "np.ndarray[Any, np.dtype[np.uint8]]") -> "tuple[np.ndarray[Any, np.dtype[np.uint64]], ...]":
    """Return what stands for bytes by the definition in `sums`, without any of the code that is fast at it."""
    filled = np.concatenate([data, np.zeros(-len(data) % ROW_BYTES, dtype=np.uint8)])
    words = filled.view("<u8").reshape(-1, ROW_WORDS)
    rows, columns = (words * make_multipliers()).sum(axis=1, dtype=np.uint64), words.sum(axis=0, dtype=np.uint64)
    return (rows, columns) if len(rows) <= ROW_WORDS else (*_known(rows.view(np.uint8)), columns)


def _make(device: "torch.device") -> DeviceKernel | None:
    import torch

    if device.type != "cuda" or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    architecture, text = f"sm_{major}{minor}", kernel_source()
    path = cache_folder() / _FOLDER / f"sums-{architecture}-{hashlib.sha256(text).hexdigest()[:16]}.cubin"
    # One that is damaged, or that the driver refuses because another version made it, is made again.
    images: list[Callable[[], bytes]] = [lambda: read_image(path), lambda: _compile(text, architecture, path)]
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # work on the device: the driver loads the image into the context that this has
        for image in images:
            try:
                kernel = DeviceKernel(ctypes.CDLL("libcuda.so.1"), image())
                if is_right(kernel, device):
                    return kernel
            except (OSError, RuntimeError, AttributeError) as error:
                if ran_out_of_memory(error):  # a full GPU is no reason to do without the kernel for good
                    raise
    return None


def write_image(path: Path, image: bytes) -> None:
    """Write an image behind the hash of its bytes; raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, hashlib.sha256(image).digest() + image)


def read_image(path: Path) -> bytes:
    """Return the image that `write_image` wrote; raises `OSError` where it is not there as it was.

    A driver is told no length: it would read beyond half an image.
    """
    content = path.read_bytes()
    digest, image = content[:_HASH_BYTES], content[_HASH_BYTES:]
    if hashlib.sha256(image).digest() != digest:
        raise OSError(f"{path} is damaged")
    return image


def _compile(text: bytes, architecture: str, path: Path) -> bytes:
    import torch

    # The library by which torch itself finds the compiler, wherever that is installed.
    image = compile_kernel(
        text, architecture, ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"))
    )
    with suppress(OSError):  # a folder that cannot be written costs the next process a fifth of a second
        write_image(path, image)
    return image


def _check(code: Any, full: int = _GPU_FULL) -> None:
    if code == full:
        where = "the GPU has no memory" if full == _GPU_FULL else "the host has no memory"
        raise OutOfMemoryError(f"{where} left for the kernel that sums the weights: end what else uses it")
    if code != 0:
        raise RuntimeError(f"CUDA answered with the error {code}")


# Row and column sums on a GPU by the compiled kernel: one launch for all tensors, one for their many row sums.


class FusedSums:
    """Sums of contiguous tensors of more than one row on one device; `results` waits once for all of them.

    All sums lie in one piece of memory, first what goes to the host: the columns of the tensors and of the row sums
    that are themselves summed, the rows of these, the rows of shorter tensors. Then come the row sums that are summed.
    """

    def __init__(self, kernel: "DeviceKernel", tensors: "list[Tensor]") -> None:
        import torch

        device = tensors[0].device
        addresses = np.array([tensor.data_ptr() for tensor in tensors])
        sizes = np.array([tensor.numel() * tensor.element_size() for tensor in tensors])
        heights = -(-sizes // ROW_BYTES)
        long, short = np.flatnonzero(heights > ROW_WORDS), np.flatnonzero(heights <= ROW_WORDS)
        long_heights = -(-heights[long] // ROW_WORDS)
        columns, column_words = _in_order(np.full(len(tensors) + len(long), ROW_WORDS))
        columns, long_columns = columns[: len(tensors)], columns[len(tensors) :]
        long_rows, end = _in_order(long_heights, column_words)
        rows = np.zeros_like(heights)
        rows[short], self._kept_words = _in_order(heights[short], end)
        # The kernel reads two words at once, which begin at an even place.
        rows[long], end = _in_order(heights[long] + heights[long] % 2, self._kept_words + self._kept_words % 2)

        self._places = [list(spans) for spans in zip(_spans(rows, heights), _spans(columns), strict=True)]
        for tensor, *spans in zip(long, _spans(long_rows, long_heights), _spans(long_columns), strict=True):
            self._places[tensor][:1] = spans
        # The driver launches in the device that is this thread's current one, once torch has worked there.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._sums = torch.empty(end, dtype=torch.int64, device=device)
            self._sums[:column_words].zero_()
            addresses_of_rows = self._sums.data_ptr() + WORD_BYTES * rows[long]
            self._launch(
                kernel,
                _parts(addresses, sizes, rows, columns),
                _parts(addresses_of_rows, WORD_BYTES * heights[long], long_rows, long_columns),
            )

    def get_results(self) -> "list[tuple[Words, ...]]":
        """Return what stands for each tensor, in their order: see `checksum`."""
        words = self._sums[: self._kept_words].cpu().numpy().view(np.uint64)
        return [tuple(words[begin:end] for begin, end in spans) for spans in self._places]

    def _launch(self, kernel: "DeviceKernel", *tables: "Numbers") -> None:
        """Run the kernel over one table of parts after the other; they go to the device together."""
        import torch

        device = self._sums.device
        there = torch.from_numpy(np.concatenate([make_multipliers().view(np.int64), *map(np.ravel, tables)])).to(device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        start = ROW_WORDS
        for table in tables:
            if len(table):
                parts = there[start : start + table.size].view(-1, PART_WORDS)
                kernel.launch_kernel(
                    parts, int(_blocks(table[-1:, 1])[0] + table[-1, -1]), there[:ROW_WORDS], self._sums, stream
                )
            start += table.size
        self._there = there  # until the kernel has passed


def _parts(addresses: "Numbers", sizes: "Numbers", rows: "Numbers", columns: "Numbers") -> "Numbers":
    """Return the kernel's table of parts."""
    return np.stack([addresses, sizes, rows, columns, _in_order(_blocks(sizes))[0]], axis=1)


def _blocks(sizes: "Numbers") -> "Numbers":
    return -(-sizes // (ROW_BYTES * BLOCK_ROWS))


def _in_order(sizes: "Numbers", start: int = 0) -> "tuple[Numbers, int]":
    """Return where each of `sizes` begins, one after the other from `start` on, and where the last one ends."""
    ends = start + np.cumsum(sizes)
    return ends - sizes, int(ends[-1]) if len(ends) else start


def _spans(begins: "Numbers", sizes: "Numbers | int" = ROW_WORDS) -> list[tuple[int, int]]:
    return list(zip(begins.tolist(), (begins + sizes).tolist(), strict=True))
