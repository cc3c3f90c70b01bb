"""The kernel for GPUs, run as it is written: its source is compiled for the host and launched as a GPU's is."""

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladezeit.errors import OutOfMemoryError
from ladezeit.validation import cuda_kernel, digest
from ladezeit.validation.checksum import ROW_BYTES, ROW_WORDS
from ladezeit.validation.cuda_kernel import DeviceKernel, FusedSums
from ladezeit.validation.digest import HostSums
from required_parts import require

HERE = Path(__file__).parent
IMAGE = b"emulated"


def emulated(source: str, folder: Path) -> ctypes.CDLL:
    """Return a CUDA driver whose device is this host, with the kernel's source in it."""
    require(shutil.which("g++"), "needs g++: apt-get install g++")
    (folder / "_sums.cu").write_text(source)
    library = folder / "libcuda.so"
    options = ["-O2", "-shared", "-fPIC", f'-DKERNEL_SOURCE="{folder / "_sums.cu"}"']
    subprocess.run(["g++", *options, "-o", str(library), str(HERE / "emulated_gpu.cpp")], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A driver with the kernel as it is."""
    return emulated(cuda_kernel.kernel_source().decode(), tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def kernel(driver: ctypes.CDLL) -> DeviceKernel:
    return DeviceKernel(driver, IMAGE)


def random_bytes(size: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def assert_as_on_the_host(kernel: DeviceKernel, tensors: list[torch.Tensor]) -> None:
    found = FusedSums(kernel, tensors).get_results()
    with ThreadPoolExecutor(2) as pool:
        for tensor, parts in zip(tensors, found, strict=True):
            wanted = HostSums(tensor, pool).get_result()
            assert [part.tolist() for part in parts] == [part.tolist() for part in wanted]


def test_the_kernel_passes_its_own_trial(kernel: DeviceKernel) -> None:
    """What decides on every GPU whether the kernel is used says yes to a right one."""
    assert cuda_kernel.is_right(kernel, torch.device("cpu"))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("column[k] += found[k]", "column[k] ^= found[k]"),
        ("distance > 0", "distance > 1"),
        ("byte < 8", "byte < 7"),
        ("start + 8 * (word)place[k], left", "start + 8 * (word)place[k], left - 1"),
        ("part.address % 16 == 0", "false"),
    ],
)
def test_a_kernel_that_adds_up_otherwise_is_not_used(right: str, wrong: str, tmp_path: Path) -> None:
    """A miscompiled kernel must not decide what is proven. One that is only slow may."""
    text = cuda_kernel.kernel_source().decode()
    assert right in text
    changed = DeviceKernel(emulated(text.replace(right, wrong), tmp_path), IMAGE)
    assert cuda_kernel.is_right(changed, torch.device("cpu")) == (wrong == "false")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("height < ROWS ? (int)height : ROWS", "height < ROWS ? (int)height : ROWS - (height > ROWS)"),
        ("sums[part.rows + first + thread] = sum", "sums[part.rows + thread] = sum"),
        ("(const unsigned char *)part.address + first * ROW_BYTES", "(const unsigned char *)part.address"),
        ("atomicAdd(sums + part.columns", "if (first == 0) atomicAdd(sums + part.columns"),
        ("(blockIdx.x - part.first_block) * ROWS", "(blockIdx.x - part.first_block) * (ROWS - 1)"),
    ],
)
def test_a_kernel_that_is_wrong_where_blocks_meet_is_not_used(right: str, wrong: str, tmp_path: Path) -> None:
    """Weights are thousands of rows: a kernel that is right within one block only would call right models wrong."""
    text = cuda_kernel.kernel_source().decode()
    assert text.count(right) == 1
    changed = DeviceKernel(emulated(text.replace(right, wrong), tmp_path), IMAGE)
    within = [
        random_bytes(size, size) for size in (3 * ROW_BYTES + 21, cuda_kernel.BLOCK_ROWS * ROW_BYTES, ROW_BYTES + 5)
    ]
    assert_as_on_the_host(changed, [*within, random_bytes(3 * ROW_BYTES + 13)[8:]])
    assert not cuda_kernel.is_right(changed, torch.device("cpu"))


@settings(max_examples=25)
@given(
    tensors=st.lists(
        st.tuples(st.integers(ROW_BYTES + 1, 5 * ROW_BYTES), st.sampled_from([0, 1, 2, 4, 8, 16])),
        min_size=1,
        max_size=6,
    )
)
def test_sums_are_the_hosts_wherever_tensors_begin_and_end(
    kernel: DeviceKernel, tensors: list[tuple[int, int]]
) -> None:
    """A manifest that was made on the host proves weights of any size, at any address of a GPU."""
    made = [random_bytes(size + offset, seed)[offset : offset + size] for seed, (size, offset) in enumerate(tensors)]
    assert_as_on_the_host(kernel, made)


@pytest.mark.parametrize("rows", [64, 65, ROW_WORDS, ROW_WORDS + 1, 2 * ROW_WORDS + 3])
def test_many_rows_are_summed_twice_as_on_the_host(kernel: DeviceKernel, rows: int) -> None:
    """Large weights beside small ones: blocks end inside a tensor, and many row sums are summed again."""
    assert_as_on_the_host(
        kernel, [random_bytes(3 * ROW_BYTES), random_bytes(rows * ROW_BYTES - 5, 1), random_bytes(2 * ROW_BYTES, 2)]
    )


def test_all_tensors_take_one_launch_and_their_row_sums_another(driver: ctypes.CDLL, kernel: DeviceKernel) -> None:
    """Thousands of experts do not cost a launch each."""
    launches = ctypes.c_int.in_dll(driver, "launches")
    before = launches.value
    FusedSums(kernel, [random_bytes(2 * ROW_BYTES, seed) for seed in range(50)])
    assert launches.value - before == 1
    FusedSums(kernel, [random_bytes((ROW_WORDS + 1) * ROW_BYTES, seed) for seed in range(2)])
    assert launches.value - before == 3


def test_a_model_on_a_device_has_the_digests_of_the_host(kernel: DeviceKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large, small, strided and empty tensors, with and without the kernel."""
    tensors = {
        "large": random_bytes(3 * ROW_BYTES).view(torch.bfloat16),
        "strided": random_bytes(4 * ROW_BYTES).view(torch.float32).view(64, -1).t(),
        "small": random_bytes(100),
        "empty": torch.empty(0, 3),
        "conjugated": random_bytes(2 * ROW_BYTES).view(torch.complex64).conj(),
        "again": random_bytes(2 * ROW_BYTES + 1, 3),
    }
    wanted = digest.digest_tensors(tensors)
    for there in (kernel, None):
        monkeypatch.setattr(digest, "device_kernel", lambda device, there=there: there)
        with ThreadPoolExecutor(2) as pool:
            assert digest._on_device(tensors, pool, 2) == wanted


def test_a_driver_that_refuses_is_an_error(driver: ctypes.CDLL, kernel: DeviceKernel) -> None:
    """A damaged file in the cache folder is refused by the driver, and made again."""
    with pytest.raises(RuntimeError, match="error 200"):
        DeviceKernel(driver, b"damaged!")


def test_a_full_gpu_is_no_damaged_kernel(driver: ctypes.CDLL) -> None:
    """A check that the GPU has no memory for is out of memory: the kernel is not given up, nor a model called wrong."""
    with pytest.raises(OutOfMemoryError, match="the GPU has no memory left"):
        DeviceKernel(driver, b"toolarge")


def test_a_kernel_that_was_damaged_on_the_disk_is_not_loaded(tmp_path: Path) -> None:
    """A driver reads an image as far as it says itself: half of one would end the process."""
    path = tmp_path / "kernels" / "one.cubin"
    cuda_kernel.write_image(path, bytes(range(200)))
    assert cuda_kernel.read_image(path) == bytes(range(200))
    content = path.read_bytes()
    for damaged in (content[:100], content[:-1], b"", content[:50] + b"?" + content[51:]):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match="is damaged"):
            cuda_kernel.read_image(path)


def test_where_there_is_no_gpu_there_is_no_kernel() -> None:
    assert cuda_kernel.device_kernel(torch.device("cpu")) is None


@pytest.mark.gpu
def test_a_gpu_uses_the_kernel_and_keeps_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every NVIDIA GPU has the fast proof: compiled once, found again, made again where the file is damaged."""
    device = torch.device("cuda", torch.cuda.current_device())
    for _ in range(2):
        monkeypatch.setattr(cuda_kernel, "_made", {})
        assert cuda_kernel.device_kernel(device) is not None
    (path,) = (cache / "kernels").glob("*.cubin")
    content = path.read_bytes()
    path.write_bytes(content[:100])
    monkeypatch.setattr(cuda_kernel, "_made", {})
    assert cuda_kernel.device_kernel(device) is not None
    assert path.read_bytes() == content


@pytest.mark.gpu
def test_a_thread_that_never_used_the_gpu_proves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service loads in threads of its own, on any of its GPUs."""
    tensors = {f"{n}": random_bytes(5 * ROW_BYTES, n) for n in range(torch.cuda.device_count())}
    there = {name: tensor.to(f"cuda:{name}") for name, tensor in tensors.items()}
    monkeypatch.setattr(cuda_kernel, "_made", {})
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(digest.digest_tensors, there).result() == digest.digest_tensors(tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 65, 2 * ROW_WORDS + 3])
def test_host_and_gpu_find_the_same_digest_by_the_kernel(rows: int) -> None:
    """The same sums as on the host, for tensors at any address."""
    whole = random_bytes(rows * ROW_BYTES + 13)
    for offset in (0, 1, 8):
        assert digest.digest_tensor(whole.cuda()[offset:]) == digest.digest_tensor(whole[offset:])
