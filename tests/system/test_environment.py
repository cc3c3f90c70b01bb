"""The facts of a run: enough to compare two machines by, and nothing in them that must stay secret."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ladezeit.system.environment import (
    LIBRARIES,
    Mount,
    collect_environment,
    describe_storage,
    git_state,
    mount_of,
    parse_mounts,
    relevant_variables,
)
from ladezeit.system.gpus import ResolvedDevice
from ladezeit.system.nvml import Gpu

CPU = ResolvedDevice("cpu", None, "running on the CPU: no NVIDIA driver answers")

MOUNTINFO = r"""
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,discard
30 22 0:40 / /data rw,relatime shared:2 master:1 - nfs4 server:/export rw,vers=4.2
31 30 0:41 / /data/fast\040disk ro,noatime - xfs /dev/nvme0n1 ro,noquota
32 22 0:42 / /data-other rw - tmpfs tmpfs rw
33 22 0:43 / /mnt rw - ext4 /dev/vdb rw
34 33 0:44 / /mnt rw - overlay overlay rw,lowerdir=/a
""".strip()


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return collect_environment(CPU, tmp_path_factory.mktemp("checkpoint"))


def test_the_facts_are_plain_data(facts: dict[str, Any]) -> None:
    """They go into the result file as they are."""
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_the_machine_is_described(facts: dict[str, Any]) -> None:
    """Python, kernel, processors and memory with their limits are there."""
    assert facts["python"] == platform.python_version()
    assert facts["platform"]["kernel"] == os.uname().release
    assert 0 < facts["cpu"]["available"] <= facts["cpu"]["threads"]
    assert 0 < facts["memory"]["limit_bytes"] <= facts["memory"]["total_bytes"]
    assert facts["device"] == {"name": "cpu", "note": CPU.note, "gpu": None}


def test_every_library_that_matters_has_its_version(facts: dict[str, Any]) -> None:
    """Two runs with different libraries can be told apart."""
    assert set(facts["libraries"]) == set(LIBRARIES)
    assert facts["libraries"]["torch"].startswith("2.")


def test_the_gpu_is_described() -> None:
    """The card, its driver and its link are in the record."""
    gpu = Gpu(0, "GPU-1", "NVIDIA H100", 80 * 2**30, "580.1", 5, 16)
    device = collect_environment(ResolvedDevice("cuda:0", gpu, None), Path("/"))["device"]
    assert (device["gpu"]["name"], device["gpu"]["pcie_width"]) == ("NVIDIA H100", 16)


def test_secrets_never_reach_a_result() -> None:
    """Results are published: no token, key or password is in them, by whatever name or inside whatever value."""
    kept = {
        "HF_HOME": "/data/hf",
        "HF_DEACTIVATE_ASYNC_LOAD": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "2",
    }
    secret = {
        "HF_TOKEN": "hf_abcdefghijklmnop",
        "HF_TOKEN_PATH": "/root/.token",
        "HUGGINGFACE_HUB_TOKEN": "x",
        "HF_API_KEY": "x",
        "PYTORCH_SECRET": "x",
        "TORCH_PASSWORD": "x",
        "LADEZEIT_CREDENTIALS": "x",
    }
    other = {"PATH": "/bin", "AWS_ACCESS_KEY_ID": "x", "HOME": "/root"}
    assert relevant_variables(kept | secret | other) == kept
    told = relevant_variables({"HF_ENDPOINT": "https://me:pass@mirror/x?t=hf_abcdefghijklmnop"})
    assert told == {"HF_ENDPOINT": "https://***@mirror/x?t=***"}


def test_the_mount_with_the_longest_path_holds_the_checkpoint() -> None:
    """A checkpoint on a network disk below the root is not called local, nor is a neighbour with a like name."""
    mounts = parse_mounts(MOUNTINFO)
    found = {
        path: mount_of(Path(path), mounts)
        for path in ("/home", "/data/m", "/data/fast disk/m", "/data-other", "/mnt/m", "/data")
    }
    kinds = {path: mount and mount.filesystem for path, mount in found.items()}
    assert kinds == {
        "/home": "ext4",
        "/data/m": "nfs4",
        "/data/fast disk/m": "xfs",
        "/data-other": "tmpfs",
        "/mnt/m": "overlay",
        "/data": "nfs4",
    }
    assert found["/data/fast disk/m"] == Mount(
        Path("/data/fast disk"), "xfs", "/dev/nvme0n1", "ro,noatime,noquota", "0:41"
    )


def test_the_checkpoints_own_filesystem_is_found(tmp_path: Path) -> None:
    """What `df` says of the folder is what the record says."""
    asked = subprocess.run(["df", "--output=fstype,target", str(tmp_path)], capture_output=True, text=True, check=True)
    filesystem, target = asked.stdout.splitlines()[1].split(maxsplit=1)
    found = describe_storage(tmp_path)
    assert (found["filesystem"], found["mount"]) == (filesystem, target)
    link = tmp_path / "link"
    link.symlink_to("/dev/shm")
    assert describe_storage(link)["mount"] == describe_storage(Path("/dev/shm"))["mount"]


def test_the_commit_of_the_source_tree_is_told_with_what_was_changed(tmp_path: Path) -> None:
    """A result can be traced to the code that made it, and says when that code was not what was committed."""
    package = tmp_path / "src" / "ladezeit"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert git_state(package) is None

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    assert git_state(package) is None
    git("add", ".")
    git("commit", "-qm", "first")
    assert git_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("changed = True\n")
    assert git_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_a_package_installed_inside_somebody_elses_repository_has_no_commit(tmp_path: Path) -> None:
    """The commit of the user's own project is not passed off as ladezeit's."""
    package = tmp_path / ".venv" / "ladezeit"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    (tmp_path / "own.py").write_text("")
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(tmp_path), "add", "own.py"], check=True)
    subprocess.run(["git", "-C", str(tmp_path), *who, "commit", "-qm", "own"], check=True)
    assert git_state(package) is None


def test_where_there_is_no_git_there_is_no_commit_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without git measures like any other."""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert git_state(Path(__file__).parent) is None
