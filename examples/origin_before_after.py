"""The case study in code: a hand-written manager's flow against `ModelManager`, on the same checkpoint and settings.

    python examples/origin_before_after.py              # the model `tiny`, made in an instant
    python examples/origin_before_after.py /data/my-model

Both read the same JSON and load the same weights with the same settings; what differs is what each does around that.
Before: settings read twice, `max_memory` passed whatever the placement, every module walked after the load, offload
accepted without a word. The figures are of one load each, so they show where time goes and decide nothing: for that,
`ladezeit experiment=origin_case`.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladezeit import ModelManager
from ladezeit.results.records import Phase
from ladezeit.timing.clock import Clock


@dataclass(frozen=True)
class Side:
    """What one flow did: its model, its seconds in all, its phases (own seconds each), what it can say of the model."""

    model: Any
    total_s: float
    phases: dict[str, float]
    claim: str


class HandWrittenManager:
    """The flow of the origin's manager, as it was; not an example to follow."""

    def __init__(self, settings_path: Path) -> None:
        self.settings_path = settings_path

    def load(self, name: str) -> Side:
        """Load as the service did, each of its steps timed."""
        from transformers import AutoModelForCausalLM

        clock = Clock(time.monotonic_ns())
        with clock.span("load"):
            with clock.span("load/settings"):
                settings = json.loads(self.settings_path.read_text())[name]
            with clock.span("load/settings"):  # once more, for the performance settings
                settings = json.loads(self.settings_path.read_text())[name]
            loading = settings["loading"]
            with clock.span("load/from_pretrained"):
                model = AutoModelForCausalLM.from_pretrained(
                    settings["path"],
                    device_map=loading["device_map"],
                    dtype=loading["torch_dtype"],
                    max_memory={"cpu": "64GiB"},  # means nothing with one explicit device
                )
            with clock.span("load/module_walk"):
                meta = [
                    name for _, module in model.named_modules() for name, p in module.named_parameters() if p.is_meta
                ]
        claim = f"{len(meta)} tensors on meta; keys, dtypes, ties and offload were not looked at"
        return Side(model, clock.since_origin_s(), own_seconds(clock.phases), claim)


def before(settings_path: Path, name: str) -> Side:
    """Return what the hand-written flow does."""
    return HandWrittenManager(settings_path).load(name)


def after(settings_path: Path, name: str) -> Side:
    """Return what `ModelManager` does with the same file."""
    manager = ModelManager(settings_path)  # read here, once
    began_s = time.monotonic()
    loaded = manager.get(name)
    total_s = time.monotonic() - began_s
    return Side(loaded.model, total_s, own_seconds(loaded.phases), loaded.verification.reason)


def own_seconds(phases: list[Phase]) -> dict[str, float]:
    """Return the time of each phase less that of the phases inside it; what none explains stands at ``load``."""
    found: dict[str, float] = {}
    for phase in phases:
        found[phase.path] = found.get(phase.path, 0.0) + phase.self_s
    return found


def side_by_side(one: Side, other: Side) -> str:
    """Return both as a table of phases, the longest first."""
    names = sorted(
        {*one.phases, *other.phases}, key=lambda name: -max(one.phases.get(name, 0), other.phases.get(name, 0))
    )
    lines = [f"{'phase':32} {'before s':>10} {'after s':>10}"]
    for name in names:
        cells = [f"{side.phases[name]:10.4f}" if name in side.phases else f"{'–':>10}" for side in (one, other)]
        lines.append(f"{name:32} {' '.join(cells)}")
    lines.append(f"{'in all':32} {one.total_s:10.4f} {other.total_s:10.4f}")
    return "\n".join([*lines, f"before says: {one.claim}", f"after says:  {other.claim}"])


def settings_for(folder: Path, to: Path) -> str:
    """Write the origin's JSON for a checkpoint and return the model's name in it."""
    loading = {"device_map": "cpu", "torch_dtype": "bfloat16", "disable_cpu_offload": True}
    to.write_text(json.dumps({folder.name: {"path": str(folder), "loading": loading}}))
    return folder.name


def _tiny() -> Path:
    from ladezeit.checkpoint.resolve import prepare_checkpoint
    from ladezeit.serving.request import model_of
    from ladezeit.system.files import cache_folder

    return prepare_checkpoint(model_of("tiny"), cache_folder()).folder


def main(arguments: list[str]) -> None:
    """Run both and print them side by side."""
    folder = Path(arguments[0]).absolute() if arguments else _tiny()
    with tempfile.TemporaryDirectory() as scratch:
        settings_path = Path(scratch) / "settings.json"
        name = settings_for(folder, settings_path)
        after(settings_path, name)  # imports, and the page cache: neither side pays for them
        print(side_by_side(before(settings_path, name), after(settings_path, name)))


if __name__ == "__main__":
    main(sys.argv[1:])
