"""What the GPU machine is asked to do: steps, their sweeps, the calls that they make up, and what a call brings along.

A *call* is one run of `gpu.py` on a machine that may be gone afterwards: it fits ten minutes, and everything that it
needs fits 64 MiB. The steps of a call stand in the order of their importance.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20

#: What has to be importable for anything to be started. Of these a machine with torch and transformers for CUDA lacks
#: hydra, omegaconf and antlr4 as a rule; how they are had stands at `PACKAGES`.
NEEDED = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "hydra",
    "omegaconf",
    "antlr4",
    "rich",
    "psutil",
    "pynvml",
)

ANY, SOURCE = "any", "source"
#: How `gpu_wheels.py` gets each package: ``any`` is a wheel for all platforms, ``source`` a source distribution alone,
#: which ``pip wheel`` makes a wheel of; else the platform that its wheel is named by, which pip wants to the letter.
#: All come in the versions of constraints.txt, but for one that has another here.
PACKAGES = {
    "hydra-core": ANY,
    "omegaconf": ANY,
    "antlr4-python3-runtime": SOURCE,
    "gguf": ANY,
    "fastsafetensors": "manylinux_2_27_x86_64",
    "instanttensor": "manylinux_2_27_x86_64",
    "runai-model-streamer": "manylinux_2_30_x86_64",
    "torchao": "manylinux_2_24_x86_64",
    "bitsandbytes": "manylinux_2_24_x86_64",
    "safetensors==0.9.0rc1": "manylinux_2_17_x86_64",
}
#: Files of a wheel that are left out: bitsandbytes brings a library for each release of CUDA and ROCm, 40 MB in all.
LEFT_OUT = {"bitsandbytes": r"libbitsandbytes_(?!cpu|cuda130).*\.so"}

_HYDRA = ("hydra-core", "omegaconf", "antlr4-python3-runtime")
_ENGINES = ("gguf", "fastsafetensors", "instanttensor", "runai-model-streamer")


@dataclass(frozen=True)
class Call:
    """The steps of one run on the machine, in their order, and the packages that it brings along."""

    steps: tuple[str, ...]
    packages: tuple[str, ...]


CALLS = {
    1: Call(("smoke", "tests", "proof", "warm", "tmpfs", "ring"), (*_HYDRA, *_ENGINES)),
    2: Call(("smoke", "cold", "cast", "half", "origin_case", "tests_other"), (*_HYDRA, *_ENGINES)),
    # A call of its own, because 0.9 takes the place of the safetensors that everything else is measured with.
    3: Call(
        ("smoke", "validation_cost", "cold_start", "prefetch", "quantised"),
        (*_HYDRA, "safetensors==0.9.0rc1", "torchao", "bitsandbytes"),
    ),
}
#: All steps, each once, in the order of the calls.
STEPS = tuple(dict.fromkeys(step for call in CALLS.values() for step in call.steps))
#: Steps that need no large checkpoint: it is written while they run.
WITHOUT_CHECKPOINT = ("smoke", "tests", "tests_other")

#: The most of a call's budget that a step may take, however much is left: those after it are to have something too.
#: The first call's up to `warm` are less than all of it, with some for the wait for the checkpoint: they surely run.
SHARES = {
    "smoke": 0.20,  # a machine that was just started reads the libraries from a cold disk
    "tests": 0.18,
    "proof": 0.18,
    "warm": 0.30,
    "tmpfs": 0.20,
    "cold": 0.35,
    "cast": 0.20,
    "half": 0.15,
    "origin_case": 0.25,
    "validation_cost": 0.35,
    "cold_start": 0.20,
    "prefetch": 0.20,
}

#: Files of GPU tests of the first call, by the beginning of their path; the others are `tests_other`.
FIRST_TESTS = ("tests/loading/streamed/", "tests/validation/content/", "tests/system/", "tests/loading/test_engines")
#: Of the others those that come last, because they take long.
LAST_TESTS = ("tests/faults/", "tests/serving/test_memory_given_back", "tests/serving/test_many_threads")


@dataclass(frozen=True)
class Sweep:
    """A sweep: its overrides, where ``{samples}`` is the axis of samples; left out where none of `needs_any` is there.

    Requirements are of packages, as pip writes them. A sample that hangs is ended after `limit_s`, to leave the others
    their time.
    """

    overrides: str
    needs_any: tuple[str, ...] = ()
    limit_s: int = 60


_OURS = "transformers,streamed,auto"
_OTHERS = "safetensors_mmap,fastsafetensors,runai_streamer,instanttensor"
#: Without the manager whose walk copies every weight of 15 GB six times: minutes.
_ORIGIN = (
    "transformers,cuda_fp16,device_map_auto,device_map_auto_max_memory,cpu_then_move,single_device_map,legacy_manager"
)
#: Threads of the ring, MiB of a slot, and whose threads they are: whether more readers pay, other slots, and native
#: ones. Hydra cannot vary two keys together, so each is an option of its own (`ring_options`).
RINGS = {
    "ring_10x8": (10, 8, "native"),
    "ring_12x8": (12, 8, "native"),
    "ring_12x4": (12, 4, "native"),
    "ring_14x8": (14, 8, "native"),
    "ring_16x8": (16, 8, "native"),
    "ring_16x16": (16, 16, "native"),
    "ring_12x8_python": (12, 8, "python"),
}

_PROVEN = "process=prewarmed validation=content"
#: Every sweep proves all bits, but for the one whose axis is how much is proven: a slot of the ring that is filled too
#: soon passes any other validation. The ceilings are measured where they say something new.
SWEEPS = {
    "warm": Sweep(f"{_PROVEN} cache=warm loading={_OURS},{_OTHERS} {{samples}}"),
    # In memory, in a file system without a disk.
    "tmpfs": Sweep(f"{_PROVEN} cache=warm loading={_OURS},fastsafetensors,instanttensor {{samples}}"),
    "ring": Sweep(f"{_PROVEN} cache=warm loading={','.join(RINGS)} inference=none ceilings=off {{samples}}"),
    "cold": Sweep(f"{_PROVEN} cache=cold loading={_OURS},{_OTHERS} {{samples}}", limit_s=120),
    "cast": Sweep(f"{_PROVEN} cache=warm loading={_OURS} loading.dtype=float16 ceilings=off {{samples}}"),
    "half": Sweep(f"{_PROVEN} cache=half loading={_OURS},instanttensor {{samples}}"),
    "origin_case": Sweep(f"experiment=origin_case loading={_ORIGIN} ceilings=off {{samples}}"),
    "validation_cost": Sweep("experiment=validation_cost ceilings=off {samples}"),
    "cold_start": Sweep(
        "process=fresh validation=content cache=warm loading=cuda_fp16,legacy_manager runtime=origin ceilings=off "
        "sample=0,1"
    ),
    "prefetch": Sweep(
        f"{_PROVEN} cache=warm loading={_OURS},safetensors_mmap,safetensors_prefetch ceilings=off {{samples}}",
        needs_any=("safetensors>=0.9.0rc1",),
    ),
    "quantised": Sweep(
        f"{_PROVEN} cache=warm loading=bitsandbytes_8bit,bitsandbytes_4bit,torchao_int8 ceilings=off",
        needs_any=("bitsandbytes>=0.50", "torchao>=0.18"),
    ),
}


def ring_options(folder: Path) -> Path:
    """Write an option of the group ``loading`` for each of `RINGS` below `folder`, for Hydra's ``--config-dir``."""
    group = folder / "loading"
    group.mkdir(parents=True, exist_ok=True)
    for name, (threads, slot_mib, readers) in RINGS.items():
        lines = [
            f"# The ring of `streamed` with {threads} {readers} threads and slots of {slot_mib} MiB.",
            f"# ladezeit --config-dir {folder} loading={name}",
            "defaults: [/schema/loading/streamed@_here_, _self_]",
            f"name: {name}",
            f"threads: {threads}",
            f"readers: {readers}",
            f"extent_bytes: {slot_mib * MIB}",
            f"ring_bytes: {2 * threads * slot_mib * MIB}",
        ]
        (group / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def gpu_tests(first: bool) -> list[str]:
    """Return the files that have tests for a GPU: those of the first call, or all others, the longest last.

    Files are named one by one because others may import what is not there.
    """
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text(encoding="utf-8")]
    names = sorted(str(file.relative_to(ROOT)) for file in files)
    chosen = [name for name in names if name.startswith(FIRST_TESTS) == first]
    # What says most of a GPU is new there comes first, what takes longest last.
    return sorted(chosen, key=lambda name: (name.startswith(LAST_TESTS), not name.startswith(FIRST_TESTS[:1])))


def missing(requirements: tuple[str, ...]) -> Iterator[str]:
    """Yield what is wrong with each requirement here."""
    from packaging.requirements import Requirement  # not needed where only wheels are fetched

    for requirement in map(Requirement, requirements):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield f"{requirement} is not installed"
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement} is wanted, {found} is installed"
