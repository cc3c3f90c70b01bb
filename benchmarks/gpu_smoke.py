"""Is this GPU machine fit for the rest? In seconds: the kernel of the proof, the link, pinned memory, three tiny loads.

    python benchmarks/gpu_smoke.py [--device cuda] [--output FILE]

`gpu.py` runs it first and stops where it fails. A machine that has no GPU runs what needs none (``--device cpu``) and
says so of the rest. Rates are in GB/s, 10⁹ bytes a second, the best of three; seconds are medians of three.

Output: FILE is written anew after each check; the last line is its content. Exit code 1 where a check failed.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ladezeit.system.environment import LIBRARIES, cpu_model, describe_storage
from ladezeit.system.files import cache_folder, write_atomically
from ladezeit.system.gpus import resolve_device
from ladezeit.system.limits import available_cpus, available_memory_bytes
from ladezeit.system.memory_warmup import host_pages
from ladezeit.validation.cuda_kernel import DeviceKernel, compile_kernel, device_kernel, is_right, kernel_source

MIB = 2**20
COPY_BYTES = 1024 * MIB
REGISTERED_BYTES = (16 * MIB, 256 * MIB)
REPETITIONS = 3
#: How long copies run while the link is looked at, which saves power between them.
LINK_S = 1.0
#: Model and dtype of the loads; all by `streamed`, all proven as far as anything can be.
LOADS = {
    "tiny bfloat16": ("tiny", "bfloat16"),
    "tiny float16": ("tiny", "float16"),
    "mixture of experts": ("tiny-moe", "bfloat16"),
}

Facts = dict[str, Any]


def main() -> None:
    """Check one thing after the other; with ``--load`` be the process of one load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--load", choices=list(LOADS), help="load only this, in this process")
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(*LOADS[arguments.load], arguments.device)))
        return
    checks: dict[str, Callable[[], Facts]] = {"system": system, "libraries": libraries}
    on_gpu: dict[str, Callable[[torch.device], Facts]] = {
        "kernel": kernel,
        "host_to_device": host_to_device,
        "registering": registering,
        "link": link,
    }
    for name, check in on_gpu.items():
        checks[name] = lambda check=check: _on_gpu(check, arguments.device)
    checks["loads"] = lambda: loads(arguments.device)
    report: Facts = {"device": arguments.device, "failed": []}
    for name, check in checks.items():
        report[name] = _checked(check)
        if "failed" in report[name]:
            report["failed"].append(name)
        print(name, json.dumps(report[name]), flush=True)
        if arguments.output:
            write_atomically(arguments.output, json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    sys.exit(1 if report["failed"] else 0)


def _checked(check: Callable[[], Facts]) -> Facts:
    started = time.monotonic()
    try:
        found = check()
    except Exception as error:  # whatever it is, the other checks say more about it
        found = {"failed": f"{type(error).__name__}: {error}"}
    return {**found, "seconds": round(time.monotonic() - started, 3)}


def _on_gpu(check: Callable[[torch.device], Facts], name: str) -> Facts:
    if name == "cpu":
        return {"note": "no GPU: --device cpu was asked for"}
    device = torch.device(resolve_device(name).name)
    with torch.cuda.device(device):
        return check(device)


def system() -> Facts:
    """Return what kernel, processors and memory this is, and what lies under the folders that tests and loads use."""
    pages = Path("/sys/kernel/mm/transparent_hugepage")
    folders = {"TMPDIR": Path(tempfile.gettempdir()), "cache": _existing(cache_folder()), "memory": Path("/dev/shm")}
    return {
        "kernel": " ".join(platform.uname()),
        "processors": {"model": cpu_model(), "available": available_cpus()},
        "memory_available_bytes": available_memory_bytes(),
        "lockable_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "large_pages": {name: _text(pages / name) for name in ("enabled", "defrag", "shmem_enabled")},
        "folders": {name: _folder(path) for name, path in folders.items()},
    }


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _folder(path: Path) -> Facts:
    if not path.is_dir():
        return {"path": str(path), "note": "is not there"}
    space = os.statvfs(path)
    return {"path": str(path), "free_bytes": space.f_bavail * space.f_frsize, **describe_storage(path)}


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def libraries() -> Facts:
    """Return the versions of what is measured and what it is measured with."""
    found: Facts = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in (*LIBRARIES, "fastsafetensors", "instanttensor", "runai-model-streamer", "bitsandbytes", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def kernel(device: torch.device) -> Facts:
    """Compile the kernel of content digests, and hold it to words of known sums.

    Raises:
        RuntimeError: it cannot be compiled or loaded, or is not right.
    """
    major, minor = torch.cuda.get_device_capability(device)
    torch.zeros(1, device=device)
    compiler = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"))
    started = time.monotonic()
    image = compile_kernel(kernel_source(), f"sm_{major}{minor}", compiler)
    compile_s = time.monotonic() - started
    if not is_right(DeviceKernel(ctypes.CDLL("libcuda.so.1"), image), device):
        raise RuntimeError("the kernel does not find the sums of known words")
    if device_kernel(device) is None:
        raise RuntimeError("the kernel is right when compiled here, and ladezeit does not take it")
    return {"architecture": f"sm_{major}{minor}", "compile_s": round(compile_s, 3), "right": True}


def host_to_device(device: torch.device) -> Facts:
    """Copy 1 GiB to the device from memory that torch pinned, that was registered afterwards, and that is neither."""
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    pinned = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True).fill_(1)
    found: Facts = {"bytes": COPY_BYTES, "pinned_gb_per_s": _rate(target, pinned)}
    del pinned
    pages = torch.frombuffer(host_pages(COPY_BYTES), dtype=torch.uint8)[:COPY_BYTES].fill_(1)
    found["pageable_gb_per_s"] = _rate(target, pages)
    refused = _register(pages)
    if refused:
        return {**found, "registered_gb_per_s": None, "note": f"cudaHostRegister answers {refused}"}
    found["registered_gb_per_s"] = _rate(target, pages)
    _unregister(pages)
    return found


def registering(device: torch.device) -> Facts:
    """Return the seconds to pin and to let go of memory of some sizes, whose pages are there already."""
    found: Facts = {}
    for size in REGISTERED_BYTES:
        pinning, letting_go = [], []
        for _ in range(REPETITIONS):
            pages = torch.frombuffer(host_pages(size), dtype=torch.uint8)[:size].fill_(1)
            refused, seconds = _timed(lambda pages=pages: _register(pages))
            if refused:
                return {"note": f"cudaHostRegister answers {refused}"}
            pinning.append(seconds)
            letting_go.append(_timed(lambda pages=pages: _unregister(pages))[1])
        medians = {"register_s": statistics.median(pinning), "unregister_s": statistics.median(letting_go)}
        found[f"{size // MIB} MiB"] = {name: round(seconds, 6) for name, seconds in medians.items()}
    return found


def link(device: torch.device) -> Facts:
    """Return generation and width of the PCIe link before copies and while they run: an idle link saves power."""
    import pynvml

    gpu = resolve_device(str(device)).gpu
    assert gpu is not None
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)

    def now() -> tuple[int, int] | str:
        try:
            ask = pynvml.nvmlDeviceGetCurrPcieLinkGeneration, pynvml.nvmlDeviceGetCurrPcieLinkWidth
            return int(ask[0](handle)), int(ask[1](handle))
        except pynvml.NVMLError as error:
            return f"the driver does not tell: {error}"

    idle, seen, stop = now(), set[tuple[int, int] | str](), threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            seen.add(now())

    watcher = threading.Thread(target=watch)
    target = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    pinned = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True).fill_(1)
    _rate(target, pinned)  # wakes the link
    watcher.start()
    began, copied = time.monotonic(), 0
    while time.monotonic() - began < LINK_S:
        target.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize(device)
        copied += len(pinned)
    seconds = time.monotonic() - began
    stop.set()
    watcher.join()
    pynvml.nvmlShutdown()
    most = {"generation": gpu.pcie_generation, "width": gpu.pcie_width}
    return {"most": most, "idle": idle, "while_copying": sorted(seen, key=str), "gb_per_s": _gb(copied, seconds)}


def loads(device: str) -> Facts:
    """Load each of `LOADS` in a process of its own, all at once: what takes the time is their imports."""
    command = [sys.executable, str(Path(__file__).resolve()), "--device", device, "--load"]
    pipes: Facts = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = {name: subprocess.Popen([*command, name], **pipes) for name in LOADS}
    found: Facts = {}
    for name, process in running.items():
        output, errors = process.communicate()
        if process.returncode == 0:
            found[name] = json.loads(output.splitlines()[-1])
        else:
            found[name] = {"exit_code": process.returncode, "error": errors.strip().splitlines()[-20:]}
    failed = [name for name, facts in found.items() if "error" in facts]
    return {**found, "failed": f"not loaded: {', '.join(failed)}"} if failed else found


def load(model: str, dtype: str, device: str) -> Facts:
    """Load by `streamed` and prove everything; raises where any of it is not as asked."""
    import ladezeit

    asked = {"engine": "streamed", "dtype": dtype}
    made = ladezeit.load(model, device=device, loading=asked, validation="full")
    kind = resolve_device(device).name
    strays = [name for name, weight in made.model.named_parameters() if str(weight.device) != kind]
    dtypes = {str(weight.dtype) for weight in made.model.parameters()}
    if strays or dtypes != {f"torch.{dtype}"} or not made.verification.passed or made.verification.level != "full":
        raise RuntimeError(f"not on {kind}: {strays[:3]}; dtypes {dtypes}; proof {made.verification.level}")
    told = {key: made.effective.get(key) for key in ("readers", "ring_bytes", "pinned_bytes", "threads", "arranged")}
    return {
        "load_s": round(made.load_s, 4),
        "total_s": round(made.total_s, 2),
        "proof": made.verification.reason,
        **told,
    }


def _rate(target: torch.Tensor, source: torch.Tensor) -> float:
    """Return the best rate of a copy to the device, in GB/s."""

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(target.device)

    return max(_gb(source.nbytes, _timed(copy)[1]) for _ in range(REPETITIONS))


def _gb(size: int, seconds: float) -> float:
    return round(size / 1e9 / seconds, 2)


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = action()
    return found, time.perf_counter() - started


def _register(memory: torch.Tensor) -> int:
    """Pin memory and return 0, or the runtime's error."""
    cudart: Any = torch.cuda.cudart
    error = int(cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if error:  # the runtime keeps it: torch would take it for that of its next kernel
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")
    return error


def _unregister(memory: torch.Tensor) -> None:
    cudart: Any = torch.cuda.cudart
    cudart().cudaHostUnregister(memory.data_ptr())


if __name__ == "__main__":
    main()
