"""What `cuda:N` is where GPUs are lost, hidden, divided or of several kinds: never silently another one."""

from dataclasses import replace

import pynvml
import pytest
import torch

from known_gpus import GIB, Driver, Known, open_cuda
from ladezeit.config import RuntimeConfig, TransformersLoading
from ladezeit.errors import NotRunnableError
from ladezeit.loading.preflight import check_on_machine, devices_used
from ladezeit.system import gpus
from ladezeit.system.gpus import check_opened, cuda_devices, numbering_variables, resolve_device
from ladezeit.system.torch_settings import import_environment

FOUR = [Known(f"GPU-{letter * 8}-0000-0000-0000-000000000000") for letter in "abcd"]
A, B, C, D = (gpu.uuid for gpu in FOUR)
LOST = replace(FOUR[1], error=pynvml.NVML_ERROR_GPU_IS_LOST)
INSTANCES = tuple(
    Known(f"MIG-{n}1111111-0000-0000-0000-000000000000", "NVIDIA H100 MIG 3g.40gb", 40 * GIB) for n in range(2)
)


@pytest.fixture(autouse=True)
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for CUDA in a process that has not opened it, where nobody chose among the GPUs."""
    monkeypatch.setattr(gpus, "torch_has_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def uuids() -> list[str]:
    return [gpu.uuid for gpu in cuda_devices()]


def test_on_a_sound_machine_numbers_are_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is set in a sample's environment but the order, and each number is that GPU."""
    Driver(FOUR).install(monkeypatch)
    assert uuids() == [A, B, C, D]
    found = resolve_device("cuda:2")
    assert found.gpu is not None and (found.gpu.uuid, found.note) == (C, None)
    assert numbering_variables() == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize(
    "error",
    [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED, pynvml.NVML_ERROR_UNKNOWN],
)
def test_a_gpu_that_is_lost_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """A node with one broken GPU goes on measuring, says so, and gives a sample the GPUs by their UUIDs."""
    Driver([FOUR[0], replace(FOUR[1], error=error), *FOUR[2:]]).install(monkeypatch)
    assert uuids() == [A, C, D]
    found = resolve_device("auto")
    assert (found.name, found.gpu) == ("cuda:0", cuda_devices()[0])
    assert str(found.note).startswith("GPU 1 of the driver cannot be used (")
    assert import_environment(RuntimeConfig())["CUDA_VISIBLE_DEVICES"] == f"{A},{C},{D}"
    assert [
        used.gpu.uuid for used in devices_used(TransformersLoading(name="a", device_map="auto"), found) if used.gpu
    ] == [A, C, D]


def test_a_gpu_that_is_lost_while_it_is_asked_about_is_left_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver may still hand out its handle."""
    Driver([FOUR[0], replace(FOUR[1], memory_error=pynvml.NVML_ERROR_GPU_IS_LOST)]).install(monkeypatch)
    assert uuids() == [A]


@pytest.mark.parametrize("number", [1, 2, 9])
def test_a_number_at_or_after_a_lost_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Whether CUDA counts the lost one nobody knows: another GPU than was meant is worse than none."""
    Driver([FOUR[0], LOST, *FOUR[2:]]).install(monkeypatch)
    with pytest.raises(NotRunnableError) as refused:
        resolve_device(f"cuda:{number}")
    assert str(refused.value) == (
        f"device=cuda:{number} was asked for: GPU 1 of the driver cannot be used (GPU is lost), and what CUDA calls "
        f"the GPUs after it is not certain. Name those to use: CUDA_VISIBLE_DEVICES={A},{C},{D}"
    )
    assert resolve_device("cuda:0").gpu == cuda_devices()[0]
    placed = TransformersLoading(name="split", device_map={"model": f"cuda:{number}", "lm_head": "cuda:0"})
    with pytest.raises(NotRunnableError, match="the placement of split names GPUs by number: GPU 1"):
        check_on_machine(placed, resolve_device("cuda:0"))


def test_the_first_gpu_may_be_the_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes the first that can be used; `cuda:0` is what it says, and refused."""
    Driver([replace(FOUR[0], error=pynvml.NVML_ERROR_GPU_IS_LOST), *FOUR[1:]]).install(monkeypatch)
    for asked in ("auto", "cuda"):
        found = resolve_device(asked)
        assert found.gpu is not None and found.gpu.uuid == B
        assert found.note == (
            "GPU 0 of the driver cannot be used (GPU is lost): it is left out, and cuda:0 is the first of the others"
        )
    with pytest.raises(NotRunnableError, match="GPU 0 of the driver cannot be used"):
        resolve_device("cuda:0")


@pytest.mark.parametrize(
    ("visible", "shown", "refused"),
    [
        (f"{C},{A}", [C, A], None),
        (f"{A},{B},{D}", [A], 1),
        ("0", [A], None),
        ("0,2", [A], 1),
        ("0,1", [A], 1),
    ],
)
def test_who_names_gpus_by_uuid_has_them_beside_a_lost_one(
    monkeypatch: pytest.MonkeyPatch, visible: str, shown: list[str], refused: int | None
) -> None:
    """The cure that the refusal names works; numbers that may mean another GPU end the list."""
    Driver([FOUR[0], LOST, *FOUR[2:]]).install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert uuids() == shown
    for number, uuid in enumerate(shown):
        found = resolve_device(f"cuda:{number}").gpu
        assert found is not None and found.uuid == uuid
    if refused is not None:
        with pytest.raises(NotRunnableError):
            resolve_device(f"cuda:{refused}")


def test_numbers_that_begin_after_a_lost_gpu_show_none_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that sets numbers beside a broken GPU is told what to set instead."""
    Driver([FOUR[0], LOST, *FOUR[2:]]).install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(NotRunnableError, match=r"CUDA_VISIBLE_DEVICES='2,3' shows none: GPU 1 .* Name GPUs by UUID"):
        resolve_device("cuda:0")
    assert resolve_device("auto").name == "cpu"


def test_gpus_that_a_control_group_hides_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under SLURM the driver lists all GPUs and opens one: CUDA calls that one 0."""
    hidden = [replace(gpu, error=pynvml.NVML_ERROR_NO_PERMISSION) for gpu in FOUR]
    Driver([hidden[0], hidden[1], FOUR[2], hidden[3]]).install(monkeypatch)
    found = resolve_device("cuda:0")
    assert found.gpu is not None and (found.gpu.uuid, found.note) == (C, None)
    assert numbering_variables() == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with pytest.raises(NotRunnableError, match=r"found cuda:0 \("):
        resolve_device("cuda:1")


def test_a_gpu_without_memory_of_its_own_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shares the host's, and the driver does not tell how much."""
    shared = replace(FOUR[0], name="NVIDIA GB10", memory_error=pynvml.NVML_ERROR_NOT_SUPPORTED)
    Driver([shared]).install(monkeypatch)
    found = resolve_device("auto").gpu
    assert found is not None and (found.name, found.total_bytes) == ("NVIDIA GB10", 0)


def test_of_divided_gpus_cuda_shows_one_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked up, locked and metered as what it is: a part of a GPU, with its own memory."""
    Driver([FOUR[0], replace(FOUR[1], mig=INSTANCES), FOUR[2]]).install(monkeypatch)
    assert uuids() == [INSTANCES[0].uuid]
    assert cuda_devices()[0].total_bytes == 40 * GIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert uuids() == [C, A]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", INSTANCES[1].uuid)
    assert uuids() == [INSTANCES[1].uuid]


def test_a_divided_gpu_without_instances_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver([replace(FOUR[0], mig=()), FOUR[1]]).install(monkeypatch)
    assert uuids() == [B]
    assert "it is in MIG mode and has no instance" in str(resolve_device("auto").note)


def test_once_cuda_is_open_torch_says_which_gpu_a_number_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA may have numbered the fastest first, and its environment may have changed since: neither counts any more.

    A reference load, which is another process, is given the same numbers.
    """
    fast = replace(FOUR[2], name="NVIDIA H200", total_bytes=141 * GIB)
    Driver([FOUR[0], FOUR[1], fast, FOUR[3]]).install(monkeypatch)
    open_cuda(monkeypatch, [fast, FOUR[0], FOUR[1]])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert uuids() == [C, A, B]
    found = resolve_device("cuda:0").gpu
    assert found is not None and (found.name, found.total_bytes, found.pcie_width) == ("NVIDIA H200", 141 * GIB, 16)
    other = resolve_device("cuda:1").gpu
    assert other is not None and (other.uuid, other.index) == (A, 1)
    assert numbering_variables() == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": f"{C},{A},{B}"}


@pytest.mark.parametrize("told", ["instance", "gpu"])
def test_an_instance_that_cuda_has_opened_is_found(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    """Torch tells the instance's UUID or that of the GPU that it is part of, as the runtime does."""
    divided = replace(FOUR[1], mig=INSTANCES[:1])
    Driver([FOUR[0], divided]).install(monkeypatch)
    open_cuda(monkeypatch, [INSTANCES[0] if told == "instance" else replace(INSTANCES[0], uuid=B)])
    (found,) = cuda_devices()
    assert (found.uuid, found.total_bytes) == (INSTANCES[0].uuid, 40 * GIB)


def test_of_several_instances_torch_alone_tells_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the memory of the whole GPU."""
    Driver([replace(FOUR[0], mig=INSTANCES)]).install(monkeypatch)
    open_cuda(monkeypatch, [replace(INSTANCES[1], uuid=A)])
    (found,) = cuda_devices()
    assert (found.total_bytes, found.name) == (40 * GIB, INSTANCES[1].name)


def test_an_open_cuda_needs_no_driver_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may lack it, and load all the same."""
    open_cuda(monkeypatch, FOUR[:2])

    def gone() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", gone)
    assert uuids() == [A, B]
    assert resolve_device("cuda:1").gpu == cuda_devices()[1]


def test_a_sample_on_another_gpu_than_the_locked_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment said: what was looked up is compared with what was opened."""
    Driver(FOUR).install(monkeypatch)
    locked = cuda_devices()[1]
    open_cuda(monkeypatch, FOUR)
    check_opened("cuda:1", locked)
    open_cuda(monkeypatch, [FOUR[1], FOUR[0]])
    with pytest.raises(NotRunnableError, match=f"cuda:1 is {A} in this process, and {B} .* was looked up and locked"):
        check_opened("cuda:1", locked)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    check_opened("cuda:1", locked)  # a torch that does not tell
