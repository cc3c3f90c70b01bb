"""The console script `ladezeit-cache`: models in the page cache, and what ladezeit keeps on disk.

Exit codes: 0 it is so now, 1 it was tried and is not so (the system took pages back, or a process has them mapped),
2 usage: no such model, or it does not fit.
"""

import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ladezeit.errors import run_as

if TYPE_CHECKING:
    from ladezeit.serving.prefetch import Residency

NOT_SO = 1

Model = Annotated[str, typer.Argument(help="A configured name, a folder, or a hub id (org/name@revision).")]
Loading = Annotated[
    str | None, typer.Option(help="The loading method; for one with its own format, the converted files are used.")
]
ConfigDir = Annotated[Path | None, typer.Option(help="A folder of your own options, such as model/mine.yaml.")]

app = typer.Typer(
    name="ladezeit-cache",
    help="Brings models into the page cache and out of it, and shows what ladezeit keeps on disk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("prefetch")
def _prefetch(
    model: Model,
    *,
    rate_mb_per_s: Annotated[
        float | None, typer.Option(help="Read at most this many MB (10^6 bytes) per second.")
    ] = None,
    loading: Loading = None,
    config_dir: ConfigDir = None,
) -> None:
    """Read a model's files into the page cache, if they fit, before they are needed."""
    from ladezeit.serving.prefetch import prefetch

    with Console(stderr=True).status(model) as status:

        def told(what: str, done: int, total: int) -> None:
            status.update(f"{what} {done / total:.0%} of {total / 1e9:.2f} GB" if total else what)

        rate = rate_mb_per_s * 1e6 if rate_mb_per_s is not None else None
        found = prefetch(model, rate=rate, loading=loading, config_dir=config_dir, progress=told)
    _say(found, f"read {found.read_bytes / 1e9:.3f} GB in {found.seconds:.2f} s; ")
    if not found.is_warm:
        raise typer.Exit(NOT_SO)


@app.command("evict")
def _evict(model: Model, *, loading: Loading = None, config_dir: ConfigDir = None) -> None:
    """Drop a model's files from the page cache; pages that a process has mapped stay."""
    from ladezeit.serving.prefetch import evict

    found = evict(model, loading=loading, config_dir=config_dir)
    _say(found)
    if not found.is_cold:
        print("some of it is mapped by a process, or is on a file system that lives in memory", file=sys.stderr)
        raise typer.Exit(NOT_SO)


@app.command("status")
def _status(model: Model, *, loading: Loading = None, config_dir: ConfigDir = None) -> None:
    """Show how much of a model's files is in memory."""
    from ladezeit.serving.prefetch import measure_residency

    found = measure_residency(model, loading=loading, config_dir=config_dir)
    print(f"{found.model}: {_share(found.after_share)} of {found.file_bytes / 1e9:.3f} GB in memory")
    for path in found.files:
        print(f"  {path}")


@app.command("list")
def _list() -> None:
    """Show what is in ladezeit's cache folder, and how much of it is in memory."""
    from ladezeit.checkpoint.cache import list_entries
    from ladezeit.system.files import cache_folder
    from ladezeit.system.page_cache import resident_share

    cache = cache_folder()
    entries = list_entries(cache)
    table = Table("folder", "kind", "files", "MB", "in memory", box=None, pad_edge=False)
    for entry in entries:
        share = _share(resident_share(entry.weights)) if entry.weights else ""
        table.add_row(entry.name, entry.kind, str(entry.files), f"{entry.size_bytes / 1e6:,.2f}", share)
    Console(soft_wrap=True).print(table)
    total = sum(entry.size_bytes for entry in entries)
    free = f", {shutil.disk_usage(cache).free / 1e9:.1f} GB of the disk are free" if cache.is_dir() else ""
    print(f"{cache}: {total / 1e9:.3f} GB{free}")


def _say(found: "Residency", read: str = "") -> None:
    print(
        f"{found.model}: {read}{_share(found.after_share)} of {found.file_bytes / 1e9:.3f} GB in memory, "
        f"{_share(found.before_share)} before"
    )


def _share(share: float) -> str:
    return "an unknown part" if math.isnan(share) else f"{100 * share:.1f} %"


def main() -> None:
    """Entry of the console script."""
    run_as("ladezeit-cache", app)
