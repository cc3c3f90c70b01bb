"""The device a sample runs on: found, named, or refused with a reason; and never by importing torch."""

import subprocess
import sys

import pytest
import torch

from ladezeit.errors import ConfigError, NotRunnableError
from ladezeit.system.gpus import (
    DRAIN_SLACK_BYTES,
    cuda_devices,
    gpu_memory_used_bytes,
    resolve_device,
    select_visible,
    torch_has_cuda,
    wait_until_drained,
)
from ladezeit.system.nvml import Gpu

HAS_GPU = torch.cuda.is_available()
without_gpu = pytest.mark.skipif(bool(cuda_devices()), reason="this machine has an NVIDIA GPU")
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")

FOUR = [Gpu(n, f"GPU-{n}{n}{n}-aa", f"card {n}", 80 * 2**30, "580.1", 5, 16) for n in range(4)]


def test_nothing_here_imports_torch() -> None:
    """The supervisor's side stays light: torch takes seconds to import and could open a GPU context."""
    program = (
        "import sys; from ladezeit.system import device_lock, environment, gpus; "
        "gpus.resolve_device('auto'); assert 'torch' not in sys.modules, 'torch'; "
        "assert 'transformers' not in sys.modules, 'transformers'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_installed_torchs_build_is_told_without_importing_it() -> None:
    """The version file says what torch itself says."""
    assert torch_has_cuda() == (torch.version.cuda is not None)


def test_the_cpu_is_always_there() -> None:
    """`device=cpu` asks no driver and has nothing to explain."""
    device = resolve_device("cpu")
    assert (device.name, device.gpu, device.note) == ("cpu", None, None)


@without_gpu
def test_auto_without_a_gpu_takes_the_cpu_and_says_why() -> None:
    """Nobody measures on the CPU for an hour believing it was the GPU."""
    device = resolve_device("auto")
    assert device.name == "cpu"
    assert device.note is not None
    assert "running on the CPU: no NVIDIA driver answers" in device.note


@without_gpu
@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "cuda:3"])
def test_a_gpu_that_is_not_there_is_refused(asked: str) -> None:
    """The error says what was asked, what was found and what to do."""
    with pytest.raises(NotRunnableError, match=rf"device={asked} was asked for, found no GPU: .*Use device=cpu"):
        resolve_device(asked)


@pytest.mark.parametrize("asked", ["gpu", "cuda:", "cuda:x", "cuda:0:1", "cpu:0", "CUDA"])
def test_a_misspelt_device_is_a_config_error(asked: str) -> None:
    """A typo is not mistaken for a missing GPU."""
    with pytest.raises(ConfigError, match="is not a device"):
        resolve_device(asked)


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2", [2]),
        ("3,1", [3, 1]),
        (" 3 , 1 ", [3, 1]),
        ("1,9,2", [1]),
        ("1,-1,2", [1]),
        ("1,1", []),
        ("GPU-222-aa,GPU-000-aa", [2, 0]),
        ("GPU-33", [3]),
        ("GPU-", []),
        ("GPU-zzz,GPU-000-aa", []),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(visible: str | None, uuids: list[int]) -> None:
    """`cuda:N` is looked up, locked and measured on the same card that torch will use."""
    chosen = select_visible(visible, FOUR)
    assert [gpu.uuid for gpu in chosen] == [FOUR[number].uuid for number in uuids]
    assert [gpu.index for gpu in chosen] == list(range(len(chosen)))


@without_gpu
def test_a_mig_instance_is_passed_through_by_its_id() -> None:
    """A slice of a card that the driver library does not describe can still be asked for, and has a lock of its own."""
    chosen = select_visible("MIG-one,MIG-two", FOUR)
    assert [(gpu.index, gpu.uuid) for gpu in chosen] == [(0, "MIG-one"), (1, "MIG-two")]


@without_gpu
def test_memory_of_a_gpu_that_is_gone_is_an_error_with_a_name() -> None:
    """A driver that went away is told as such."""
    with pytest.raises(NotRunnableError, match="card 0"):
        gpu_memory_used_bytes(FOUR[0])


@pytest.mark.gpu
@on_gpu
def test_the_gpus_found_are_those_of_torch() -> None:
    """Name, memory and order agree with what torch will use."""
    gpus = cuda_devices()
    assert len(gpus) == torch.cuda.device_count()
    for gpu in gpus:
        properties = torch.cuda.get_device_properties(gpu.index)
        assert gpu.uuid.removeprefix("GPU-") == str(properties.uuid)
        assert gpu.name == properties.name
        assert gpu.total_bytes >= properties.total_memory
        assert gpu.pcie_generation is None or gpu.pcie_generation >= 1


@pytest.mark.gpu
@on_gpu
def test_auto_and_cuda_take_the_first_gpu() -> None:
    """`device=auto` on a GPU machine needs no more words."""
    for asked in ("auto", "cuda", "cuda:0"):
        device = resolve_device(asked)
        assert (device.name, device.note) == ("cuda:0", None)
        assert device.gpu == cuda_devices()[0]
    with pytest.raises(NotRunnableError, match=r"device=cuda:99 was asked for, found cuda:0 \("):
        resolve_device("cuda:99")


@pytest.mark.gpu
@on_gpu
def test_waiting_until_the_gpu_drained_sees_another_process_end() -> None:
    """The next sample starts only when the last one's memory is back."""
    gpu = cuda_devices()[0]
    baseline_bytes = gpu_memory_used_bytes(gpu)
    program = "import torch; torch.zeros(2**30, device='cuda:0'); torch.cuda.synchronize(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        full = wait_until_drained(gpu, baseline_bytes, limit_s=0.1)
        process.communicate("\n")
    assert not full.drained
    assert full.used_bytes > baseline_bytes + 2**30
    drained = wait_until_drained(gpu, baseline_bytes, limit_s=30)
    assert drained.drained
    assert drained.used_bytes <= baseline_bytes + DRAIN_SLACK_BYTES
