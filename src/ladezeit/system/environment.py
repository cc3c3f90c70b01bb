"""What machine, storage and software a sample ran on; collected without importing torch, in tens of milliseconds."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from ladezeit.redaction import redact_text
from ladezeit.system.gpus import ResolvedDevice

LIBRARIES = (
    "ladezeit",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "hydra-core",
    "omegaconf",
    "mlflow",
    "numpy",
)

#: Environment variables that can change what a load does, by their beginning.
_TELLING = re.compile(
    r"(HF_|HUGGINGFACE_|TRANSFORMERS_|ACCELERATE_|SAFETENSORS_|TOKENIZERS_|TORCH|PYTORCH|CUDA_|NVIDIA_|NCCL_|CUBLAS_"
    r"|OMP_|MKL_|OPENBLAS_|GOMP_|KMP_|MALLOC_|LD_PRELOAD$|PYTHON[A-Z]|LADEZEIT_)"
)
_SECRET = re.compile(r"TOKEN(?!IZERS_)|KEY|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_GIT_LIMIT_S = 5.0


def collect_environment(device: ResolvedDevice, checkpoint_folder: Path) -> dict[str, Any]:
    """Return the facts about this machine and its software as nested plain data, ready for JSON.

    What this machine does not tell is None or left out; nothing here fails for want of a fact.
    """
    return {
        "python": platform.python_version(),
        "platform": {
            "system": platform.platform(),
            "kernel": platform.release(),
            "machine": platform.machine(),
            "virtualisation": _virtualization(),
        },
        "cpu": _cpu(),
        "memory": _memory(),
        "storage": describe_storage(checkpoint_folder),
        "device": {"name": device.name, "note": device.note, "gpu": asdict(device.gpu) if device.gpu else None},
        "libraries": _libraries(),
        "git": git_state(Path(__file__).parent),
        "variables": relevant_variables(dict(os.environ)),
    }


def relevant_variables(variables: dict[str, str]) -> dict[str, str]:
    """Return those of `variables` that can change what a load does.

    None whose name speaks of a secret is among them; a password in a URL and a hub token in a value are struck out.
    """
    told = {name for name in variables if _TELLING.match(name) and not _SECRET.search(name)}
    return {name: _HUB_TOKEN.sub("***", redact_text(variables[name])) for name in sorted(told)}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the source tree that `folder` is part of, and whether files differ from it.

    None where there is no git, no repository, or where `folder` is only installed inside somebody else's.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    tracked = _git(folder, "ls-files", "--error-unmatch", "--", "__init__.py")
    if not top or not commit or not tracked:
        return None
    status = _git(Path(top), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    # Without optional locks `git status` writes nothing, so it cannot get in the way of somebody's commit.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_LIMIT_S, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _libraries() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_model() -> str | None:
    """Return what the processors call themselves; None where nobody tells."""
    return _cpuinfo("model name") or platform.processor() or None


def _cpu() -> dict[str, Any]:
    from ladezeit.system.limits import available_cpus

    return {
        "model": cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(logical=True),
        "available": available_cpus(),
    }


def _memory() -> dict[str, Any]:
    from ladezeit.system.limits import available_memory_bytes, memory_limit_bytes

    return {
        "total_bytes": psutil.virtual_memory().total,
        "limit_bytes": memory_limit_bytes(),
        "available_bytes": available_memory_bytes(),
        "swap_bytes": psutil.swap_memory().total,
    }


def _virtualization() -> dict[str, Any]:
    return {
        "hypervisor": "hypervisor" in (_cpuinfo("flags") or "").split(),
        "container": _container(),
        "machine": _first_line(Path("/sys/class/dmi/id/product_name")),
    }


def _container() -> str | None:
    """Return the kind of container this process is in, as container runtimes mark it."""
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    # systemd's own name for it, in lower case.
    return os.environ.get("container")  # noqa: SIM112


def _cpuinfo(key: str) -> str | None:
    if sys.platform != "linux":
        return None
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1) if found else None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


# Which filesystem and block device a checkpoint lies on, as the kernel tells.


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo; `number` is the device's ``major:minor``, `options` those of mount and filesystem."""

    point: Path
    filesystem: str
    source: str
    options: str
    number: str


def describe_storage(path: Path) -> dict[str, Any]:
    """Return the mount that holds `path` and the disk under it; empty where the kernel does not tell."""
    try:
        mounts = parse_mounts(Path("/proc/self/mountinfo").read_text(encoding="utf-8"))
    except OSError:
        return {}
    mount = mount_of(path.resolve(), mounts)
    if mount is None:
        return {}
    return {
        "mount": str(mount.point),
        "filesystem": mount.filesystem,
        "source": mount.source,
        "options": mount.options,
        "disk": _disk(mount.number),
    }


def parse_mounts(mountinfo: str) -> list[Mount]:
    """Parse the text of ``/proc/<pid>/mountinfo`` (proc_pid_mountinfo(5))."""
    mounts = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        before, after = left.split(), right.split()
        options = ",".join(dict.fromkeys(f"{before[5]},{after[2]}".split(",")))
        mounts.append(Mount(Path(_unescaped(before[4])), after[0], _unescaped(after[1]), options, before[2]))
    return mounts


def mount_of(path: Path, mounts: list[Mount]) -> Mount | None:
    """Return the mount with the longest point above `path`; of several on one point the last, which covers them."""
    holding = [mount for mount in mounts if path == mount.point or mount.point in path.parents]
    return max(reversed(holding), key=lambda mount: len(mount.point.parts), default=None)


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal.group(1), 8)), field)


def _disk(number: str) -> dict[str, Any] | None:
    """Describe the whole disk that a device number belongs to; None where there is none (tmpfs, NFS, overlay)."""
    link = Path("/sys/dev/block") / number
    if not link.exists():
        return None
    folder = Path(os.path.realpath(link))
    if (folder / "partition").exists():
        folder = folder.parent
    rotational = _text(folder / "queue/rotational")
    return {
        "name": folder.name,
        "model": _text(folder / "device/model"),
        "rotational": None if rotational is None else rotational == "1",
        "read_ahead_kib": _number(folder / "queue/read_ahead_kb"),
        "scheduler": _text(folder / "queue/scheduler"),
    }


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdigit() else None
