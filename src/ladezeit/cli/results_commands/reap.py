"""`ladezeit-results reap`: runs that look as if they were running, although their process died."""

from collections import Counter
from typing import Annotated

import typer

from ladezeit.cli.results_commands.stores import DEFAULT_EXPERIMENT, Experiment, TrackingUri, open_store, outputs_folder


def reap_command(
    *,
    experiment: Experiment = DEFAULT_EXPERIMENT,
    tracking_uri: TrackingUri = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")] = False,
) -> None:
    """Close the runs of dead processes with their true status; runs of live processes and other machines stay."""
    from ladezeit.tracking.sync import Fate, close_orphans, find_orphans

    tracker = open_store(experiment, tracking_uri)
    sweeps = outputs_folder() / "sweeps"
    found = find_orphans(tracker, sweeps) if dry_run else close_orphans(tracker, sweeps)
    for finding in found:
        print(f"{finding.role} {finding.name} ({finding.run_id}): {finding.fate.value}: {finding.why}")
    counts = Counter(finding.fate for finding in found)
    said = ", ".join(f"{counts[fate]} {fate.value}" for fate in Fate if counts[fate])
    print(f"{'would be' if dry_run else 'open runs'}: {said}" if found else "no run is open")
