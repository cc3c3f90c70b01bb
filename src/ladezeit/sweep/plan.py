"""Which samples a sweep has, and in which order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ladezeit.config import RunConfig
from ladezeit.errors import LadezeitError
from ladezeit.sweep.prepared import PreparedConfiguration


@dataclass(frozen=True)
class Job:
    """One sample of a sweep: the overrides that compose it, and what they compose to.

    Either it is `prepared`, or `refusal` says why it cannot run here.
    """

    overrides: list[str]
    config: RunConfig
    prepared: PreparedConfiguration | None = None
    refusal: LadezeitError | None = None


def in_blocks(jobs: Sequence[Job], seed: int) -> list[Job]:
    """Order `jobs` in one block a sample number, shuffled inside each block by `seed`.

    Whatever drifts while a sweep runs (clocks, temperature, a neighbor) then meets every point alike.
    """
    blocks: dict[int, list[Job]] = {}
    for job in jobs:
        blocks.setdefault(job.config.sample, []).append(job)
    ordered = []
    for sample in sorted(blocks):
        block = blocks[sample]
        random.Random(f"{seed}/{sample}").shuffle(block)
        ordered += block
    return ordered


def varying_keys(jobs: Sequence[Job]) -> list[str]:
    """Return the override keys that have several values over `jobs`: cache and loading first, the sample last."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for override in job.overrides:
            key, _, value = override.partition("=")
            values.setdefault(key.lstrip("+~"), set()).add(value)
    keys = [key for key, found in values.items() if len(found) > 1 and not key.startswith("hydra.")]
    first = {"model": 0, "cache": 1, "loading": 2, "sample": 9}
    return sorted(keys, key=lambda key: first.get(key, 5))
