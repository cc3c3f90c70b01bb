"""`ladezeit.trace`: measure a load function of your own, in the process that it is called in.

The function is not changed: the clock, the phases, the verification and the result files are those of every loading
method. Fresh processes, page-cache states and the comparison with other methods are `ladezeit-trace`'s.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladezeit.analysis.attribution import UNATTRIBUTED, self_times
from ladezeit.errors import ConfigError, did_you_mean
from ladezeit.results.format import format_seconds
from ladezeit.results.records import Result, Status

_MOST_NAMED = 3


@dataclass(frozen=True)
class Trace:
    """What was measured: one result a repetition, each with its files in a folder below `folder`."""

    name: str
    results: list[Result]
    folder: Path

    def __str__(self) -> str:
        """Say in a few lines how long it took, where the time went, and what was verified."""
        return "\n".join(_lines(self.name, result) for result in self.results) + f"\nfiles: {self.folder}"


def trace(
    load: Callable[..., Any],
    checkpoint: str | Path,
    *,
    name: str | None = None,
    repeats: int = 1,
    output: str | Path | None = None,
    overrides: list[str] | None = None,
) -> Trace:
    """Measure `load` as it is, here and now, and verify the model that it returns.

    A load in this process finds what earlier ones left (imports, caches, memory of the GPU): for figures to decide by
    use ``ladezeit-trace``, which starts a fresh process for each sample.

    Args:
        load: called with the checkpoint's folder, and with `device` and `dtype` where it has parameters of these names;
            without anything where it has none. Returns the model, a tuple or dict with it, or an object with `.model`.
        checkpoint: a folder, or the name of an option of the group `model` (``tiny``).
        name: what the load is called in results; the function's own name where it is None.
        repeats: how often it is called, one after another; each model is let go before the next.
        output: the folder for the results; a new one below ``outputs/traces`` where it is None.
        overrides: any other config (``["cache=cold", "validation=content", "loading.dtype=float16"]``).

    Returns:
        The results, which print as a summary; ``ladezeit-results`` reads the same from `Trace.folder`.

    Raises:
        LadezeitError: the checkpoint or a config is not what it should be. What `load` raises is in the result.
    """
    from ladezeit.loading.instrumentation import unwrap_function
    from ladezeit.tracing.in_process import measure_in_process

    known = unwrap_function(load)
    called = f"{known.__module__}:{known.__qualname__}"
    own = name or called.partition(":")[2]
    if repeats < 1:
        raise ConfigError(f"repeats={repeats} measures nothing: the least is 1")
    folder = Path(output or Path("outputs") / "traces" / time.strftime("%Y-%m-%d_%H-%M-%S")).resolve()
    words = [*checkpoint_words(checkpoint), "loading=traced", f"loading.function={_quoted(called)}"]
    words += [f"loading.name={_quoted(own)}", "tracking=none", "inference=none", *(overrides or [])]
    results = measure_in_process(load, words, folder, repeats)
    return Trace(own, results, folder)


def checkpoint_words(checkpoint: str | Path) -> list[str]:
    """Return the overrides that choose a checkpoint, given as a folder or by the name of a configured model.

    Raises:
        ConfigError: it is neither.
    """
    from importlib.resources import files

    if Path(checkpoint).is_dir():
        path = Path(checkpoint).resolve()
        return ["model=folder", f"model.path={_quoted(str(path))}", f"model.name={_quoted(path.name)}"]
    options = (entry.name for entry in (files("ladezeit.conf") / "model").iterdir())
    names = sorted(name.removesuffix(".yaml") for name in options if name.endswith(".yaml") and name != "folder.yaml")
    if str(checkpoint) not in names:
        raise ConfigError(
            f"the checkpoint '{checkpoint}' is no folder and no configured model: there are {', '.join(names)}."
            + did_you_mean(str(checkpoint), names)
        )
    return [f"model={checkpoint}"]


def _quoted(text: str) -> str:
    """Return `text` as a value in an override, whatever characters it has."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _lines(name: str, result: Result) -> str:
    total_s = result.metrics.get("load/total_s")
    if total_s is None or result.status is not Status.ok:
        return f"{name}: {result.status.value}: {result.reason}"
    places = result.effective.get("functions", {})
    spent = {path: values[0] for path, values in self_times([result]).items()}
    lines = [f"{name} takes {format_seconds(total_s)} s ({result.config['model']['name']}, in this process)"]
    for path, own_s in sorted(spent.items(), key=lambda pair: -pair[1])[:_MOST_NAMED]:
        where = f" ({places[path]})" if path in places else ""
        what = "no phase that is known (profile=true looks into it)" if path == UNATTRIBUTED else path
        lines.append(f"  {format_seconds(own_s)} s ({100 * own_s / total_s:.0f} %) in {what}{where}")
    proof = result.proof or {}
    lines.append(f"  verification: {proof.get('level')}: {proof.get('reason')}")
    return "\n".join(lines)
