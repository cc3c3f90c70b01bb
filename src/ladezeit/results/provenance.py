"""Where figures come from: which samples, of which sweeps, on which machine."""

from ladezeit.result import Status
from ladezeit.results.machines import machine_name
from ladezeit.results.reading import Samples


def what_was_read(samples: Samples) -> str:
    """Return what was read, in a sentence: how many samples of which sweeps, on which machine."""
    ok = sum(result.status is Status.ok for result in samples.results)
    sweeps = sorted({result.identity.sweep for result in samples.results if result.identity.sweep})
    of = f" of {len(sweeps)} sweeps" if len(sweeps) > 1 else f" of sweep {sweeps[0]}" if sweeps else ""
    machine = next((machine_name(result) for result in samples.results if result.environment), "an unknown machine")
    missing = f" {samples.missing} planned samples are missing." if samples.missing else ""
    return f"{len(samples.results)} samples{of}, {ok} ok, measured on {machine}.{missing}"
