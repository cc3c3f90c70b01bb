"""The fault bench: every engine that runs on a CPU, every fault, every level of validation, in this process.

A fault of files is planted in a copy of a tiny checkpoint after the manifest of the original was made, or, where an
engine has a format of its own, in its converted file; a fault in memory by an engine of `planting`. Then the way is a
sample's: the files are inspected, the engine loads, each level proves.
"""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import planting
import torch
from file_faults import IN_FILES, names_of, places_in, places_in_conversion, plant
from hydra import compose, initialize_config_module
from planting import IN_MEMORY

from ladezeit.checkpoint.resolve import Checkpoint, inspect_checkpoint, prepare_checkpoint
from ladezeit.config import RunConfig, ValidationConfig, ValidationLevel, build_config
from ladezeit.config.hydra_support import register_schemas
from ladezeit.errors import NotRunnableError
from ladezeit.loading import registry
from ladezeit.loading.base import Conversion, EngineModel
from ladezeit.loading.conversion import conversion_for
from ladezeit.runner import pipeline
from ladezeit.timing.clock import Clock
from ladezeit.validation import references
from ladezeit.validation.expected import Expected
from ladezeit.validation.faults import Fault
from ladezeit.validation.levels import verify_generation, verify_model
from ladezeit.validation.references import NEED_REFERENCE, reference_key_of

#: Every engine that brings the checkpoint's own weights onto a CPU.
ENGINES = (
    "transformers",
    "legacy_manager",
    "accelerate",
    "safetensors_mmap",
    "safetensors_pread",
    "fastsafetensors",
    "runai_streamer",
    "torch_dcp",
    "tensorizer",
    "gguf",
    "streamed",
    "auto",
)
#: Content is read after memory that was given back is overwritten, and breaks it: those levels come last.
LEVELS = tuple(sorted(ValidationLevel, key=lambda level: level in (ValidationLevel.content, ValidationLevel.full)))
#: Whether a forward meets freed memory before its next user does is luck, so that is not asked.
BY_LUCK = {(ValidationLevel.logits, Fault.freed_buffer)}


@dataclass(frozen=True)
class Case:
    """A fault under an engine, and the names of which a finding must say at least one."""

    engine: str
    fault: Fault | None
    names: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a sample ended: `found` where it did not end ok; `said` names all that was found, and where it ended."""

    engine: str
    fault: Fault | None
    level: ValidationLevel
    found: bool
    said: str
    names: tuple[str, ...]

    @property
    def named(self) -> bool:
        """Whether a weight or file that has the fault is named."""
        return any(name in self.said for name in self.names)


class Bench:
    """A tiny checkpoint with what it is proven by, and copies of it with each fault of files."""

    def __init__(self, cache_folder: Path, scratch: Path, device: str = "cpu") -> None:
        from transformers.utils import logging as library

        library.disable_progress_bar()
        library.set_verbosity(logging.CRITICAL)
        scratch.mkdir(exist_ok=True)
        self._scratch, self._cache, self._device = scratch, cache_folder, device
        self.checkpoint = prepare_checkpoint(composed("transformers").model, cache_folder)
        asked = reference_key_of(
            composed("transformers"), self.checkpoint, device=device, hardware="here", cache=cache_folder
        )
        self._reference_files = references.prepare_references(composed("transformers"), asked)
        self._damaged = {fault: self._damage(fault) for fault in IN_FILES}

    def run(self, engines: tuple[str, ...] = ENGINES) -> list[Outcome]:
        """Return the outcomes of all engines, faults and levels that there are."""
        with one_thread():
            return [outcome for engine in engines for fault in Fault for outcome in self.outcomes(engine, fault)]

    def outcomes(self, engine: str, fault: Fault | None) -> list[Outcome]:
        """Return how a sample ends at each level; `fault` None plants none. Empty where the format cannot have it."""
        config = composed(engine)
        names: tuple[str, ...] = ()
        checkpoint, conversion = self.checkpoint, self._conversion(engine)
        if fault in IN_FILES:
            names = names_of(fault, self.checkpoint)
            if conversion is not None:
                if not IN_FILES[fault][1]:
                    return []
                conversion, names = self._damaged_conversion(fault, conversion), (*names, str(conversion.folder.name))
            else:
                try:
                    checkpoint = inspect_checkpoint(self._damaged[fault], "damaged")
                except Exception as error:
                    return ended(Case(engine, fault, names), f"before the load: {error}")
        elif fault is not None:
            names = IN_MEMORY[fault][1]
            config = replace(config, loading=replace(config.loading, engine=planting.planting(fault, engine)))
        case = Case(engine, fault, names)
        return self._levels(case, config, checkpoint, conversion)

    def _levels(
        self,
        case: Case,
        config: RunConfig,
        checkpoint: Checkpoint,
        conversion: Conversion | None,
    ) -> list[Outcome]:
        asked = pipeline.make_expected(config, self.checkpoint, self._device, self._reference_files)
        try:
            loaded = self._loaded(config, checkpoint, conversion)
        except Exception as error:
            return ended(case, f"the load: {error}")
        return [
            Outcome(case.engine, case.fault, level, *proven(loaded, asked, level), case.names)
            if (level, case.fault) not in BY_LUCK
            else Outcome(case.engine, case.fault, level, False, "not asked", case.names)
            for level in LEVELS
        ]

    def _loaded(self, config: RunConfig, checkpoint: Checkpoint, conversion: Conversion | None) -> EngineModel:
        folder = self._scratch / f"load-{time.monotonic_ns()}"
        folder.mkdir()
        request = pipeline.make_request(config, checkpoint, self._device, folder, conversion=conversion)
        chosen = registry.make_engine(config.loading.engine)
        chosen.prepare(request)
        return pipeline.load_model(chosen, request, Clock(time.monotonic_ns(), detail=False))

    def _damage(self, fault: Fault) -> Path:
        folder = self._scratch / fault
        shutil.copytree(self.checkpoint.folder, folder)
        plant(fault, folder / self.checkpoint.shards[0].name, places_in(self.checkpoint))
        return folder

    def _conversion(self, engine: str) -> Conversion | None:
        return conversion_for(engine, self.checkpoint, "tiny", self._cache, lambda *_: None)

    def _damaged_conversion(self, fault: Fault, conversion: Conversion) -> Conversion:
        folder = self._scratch / f"{conversion.folder.name}-{fault}"
        shutil.copytree(conversion.folder, folder)
        (path,) = (folder / file.name for file in conversion.files)
        plant(fault, path, places_in_conversion(self.checkpoint, path))
        return replace(conversion, folder=folder, files=(path,))


def ended(case: Case, said: str) -> list[Outcome]:
    """Return the outcomes of a sample that came to no proof, whatever its level."""
    return [Outcome(case.engine, case.fault, level, True, said, case.names) for level in LEVELS]


def proven(loaded: EngineModel, asked: Expected, level: ValidationLevel) -> tuple[bool, str]:
    """Prove as a worker does; return whether anything was found, and all of it."""
    clock = Clock(time.monotonic_ns())
    try:
        proof = verify_model(loaded, asked, ValidationConfig(level), clock)
        if level in NEED_REFERENCE and (proof.passed or not proof.ran):
            proof = verify_generation(loaded, asked, proof, clock)
    except Exception as error:
        return True, f"the forward: {error}"
    return proof.ran and not proof.passed, "; ".join(map(str, proof.findings)) or proof.reason


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread for the block: layers this small cost many threads more waiting than work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def composed(engine: str) -> RunConfig:
    """Return the run that ``ladezeit model=tiny loading=<engine>`` composes, in the checkpoint's own dtype."""
    register_schemas()
    with initialize_config_module("ladezeit.conf", version_base="1.3"):
        asked = [
            f"loading={engine}",
            "model=tiny",
            "loading.dtype=auto",
            "runtime.threads=1",
            "validation=full",
            "outputs=outputs",
            "hydra/sweeper=basic",
        ]
        return build_config(compose("config", asked))


def refused_here() -> dict[str, str]:
    """Return the engines that cannot run here, each with the reason."""
    refused = {}
    for name in ENGINES:
        try:
            registry.check_engine(name, "cpu", "safetensors")
        except NotRunnableError as refusal:
            refused[name] = str(refusal)
    return refused
