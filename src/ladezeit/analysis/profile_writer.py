"""The loading profile: the method that a verdict chose, per model, device and dtype, with the evidence for it.

The YAML file is what ``ladezeit`` takes up again: `overrides` are words of its command line. The JSON form is that of
the origin case, keyed by model, for services that call `from_pretrained` themselves.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ladezeit.analysis.attribution import ends_with
from ladezeit.analysis.comparison import PointFigures
from ladezeit.analysis.decision import Decision
from ladezeit.analysis.eligibility import machine_of
from ladezeit.analysis.standing import State
from ladezeit.analysis.statistics import LEAST_TO_RANK
from ladezeit.config.loading_profile import SCHEMA_VERSION, is_origin, read_models
from ladezeit.errors import ConfigError, LadezeitError
from ladezeit.results.fields import fingerprint_of, value_of
from ladezeit.results.records import Result
from ladezeit.system.files import write_atomically

#: Groups of the config that say how is loaded; everything else says what, where and how it is measured.
_METHOD_GROUPS = ("loading", "runtime")

#: The engine whose arguments are those of `from_pretrained`.
_PRETRAINED = "transformers"

#: The manager to be cured is measured to be compared with, never to be used.
SPECIMEN = "legacy_manager"

_LIBRARIES = ("ladezeit", "torch", "transformers", "accelerate", "safetensors")


def write_profile(path: Path, decisions: Sequence[Decision]) -> list[str]:
    """Write the profile (the origin's form where `path` ends in ``.json``) and return the models in it.

    Raises:
        LadezeitError: no section has a decision to write, or none that the origin's form can express.
    """
    entries = entries_of(decisions)
    if not entries:
        raise LadezeitError(
            f"there is no decision to write into {path}: "
            f"every configuration has fewer than {LEAST_TO_RANK} verified samples"
        )
    if path.suffix == ".json":
        written = origin_form(entries)
        if not written:
            raise LadezeitError(
                f"none of the best methods is a from_pretrained call, which is all that the form of {path} can say: "
                f"write a .yaml profile instead"
            )
        text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
    else:
        import yaml

        models: dict[str, list[dict[str, Any]]] = {}
        for entry in entries:
            models.setdefault(entry["model"], []).append({k: v for k, v in entry.items() if k != "model"})
        written = models
        document = {"schema_version": SCHEMA_VERSION, "models": models}
        text = "# A loading profile of ladezeit: the measured best method per model.\n"
        text += yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    try:
        write_atomically(path, text)
    except OSError as cause:
        raise LadezeitError(f"{path} cannot be written: {cause}") from cause
    return list(written)


def read_profile(path: Path) -> Mapping[str, list[dict[str, Any]]]:
    """Return the entries of a YAML profile by model.

    Raises:
        ConfigError: the file cannot be read, or is not a profile of this version in YAML.
    """
    models = read_models(path, str(path))
    if any(is_origin(entry) for entry in models.values()):
        raise ConfigError(
            f"{path} has the form of services that call from_pretrained, without engine and evidence: "
            f"give the YAML of ladezeit-results verdict --write-profile profile.yaml"
        )
    return models


def entries_of(decisions: Sequence[Decision]) -> list[dict[str, Any]]:
    """Return one entry for each section that is decided, and for each dtype that its methods end with."""
    entries = []
    for decision in decisions:
        if decision.load.state in (State.too_few, State.absent):
            continue
        taken: set[str] = set()
        for point in _by_preference(decision):
            if point.samples[0].config["loading"].get("engine") == SPECIMEN:
                continue
            sample = next(result for result in point.samples if result.effective)
            dtype = str(ends_with(sample)["dtype"])
            if dtype not in taken:
                taken.add(dtype)
                entries.append(_entry(decision, point, dtype))
    return entries


def _by_preference(decision: Decision) -> list[PointFigures]:
    """Return the ranked points, best first; among equals the current config, which nobody has to change."""
    points = [point for point in [*decision.load.best, *decision.load.others] if point.rank is not None]
    own = decision.current.point.point if decision.current else ""
    return sorted(points, key=lambda point: (point.rank or 0, point.point != own))


def _entry(decision: Decision, point: PointFigures, dtype: str) -> dict[str, Any]:
    sample = next(result for result in point.samples if result.effective)
    spread = point.spread
    assert spread is not None
    libraries = sample.environment.get("libraries") or {}
    points = [*decision.load.best, *decision.load.others]
    alike = [other.name for other in points if other.rank == point.rank and other.point != point.point]
    return {
        "model": value_of(sample, "model"),
        "checkpoint": fingerprint_of(sample),
        "device": str(sample.effective.get("device", "unknown")),
        "dtype": dtype,
        "cache": decision.conditions.get("cache", ""),
        "method": point.name,
        "overrides": overrides_of(sample),
        "loading": dict(sample.config["loading"]),
        "evidence": {
            "sweeps": sorted({r.identity.sweep for r in point.samples if r.identity.sweep}),
            "point": point.point,
            "n": spread.n,
            "load_median_s": spread.median,
            "load_interval_s": [spread.interval.low, spread.interval.high],
            "interval_coverage": spread.interval.coverage,
            "best_of_all_dtypes": point.rank == 1,
            "not_distinguishable_from": alike,
            "proof": point.level,
            "machine": machine_of(sample),
            "libraries": {name: libraries[name] for name in _LIBRARIES if name in libraries},
        },
    }


def overrides_of(sample: Result) -> list[str]:
    """Return the words for ``ladezeit``'s command line that choose this method, and nothing else."""
    own = [
        override
        for override in sample.identity.overrides
        if override.lstrip("+~").partition("=")[0].partition(".")[0] in _METHOD_GROUPS
    ]
    groups = {override.partition("=")[0] for override in own}
    if "loading" not in groups:
        own.insert(0, f"loading={sample.config['loading']['name']}")
    if "runtime" not in groups:  # an experiment may have chosen it: its values are said one by one
        runtime = sample.config.get("runtime") or {}
        own += [f"runtime.{k}={v}" for k, v in runtime.items() if v is not None and f"runtime.{k}" not in groups]
    return own


def origin_form(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the origin's JSON form of the best entry of each model that is a `from_pretrained` call."""
    found: dict[str, Any] = {}
    for entry in entries:
        loading = entry["loading"]
        if entry["model"] in found or not entry["evidence"]["best_of_all_dtypes"]:
            continue
        if loading.get("engine") != _PRETRAINED or not isinstance(loading.get("device_map"), str):
            continue
        device = entry["device"].partition(":")[0]
        found[entry["model"]] = {
            "loading": {
                "device_map": device if loading["device_map"] == "device" else loading["device_map"],
                "torch_dtype": entry["dtype"],
                "disable_cpu_offload": loading["disable_cpu_offload"],
            }
        }
    return found
