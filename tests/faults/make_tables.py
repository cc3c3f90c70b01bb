"""Runs the fault bench and the peers, and writes what the report and docs/verification.md say of them.

    python tests/faults/make_tables.py [--no-peers]

It takes some minutes. Costs are read from benchmarks/results, where benchmarks/validation_cost.py and
benchmarks/proof.py wrote them. The tests run the same bench and compare: neither table nor data is written by hand.
"""

import argparse
import json
import tempfile
from pathlib import Path

import peers
import tables
from bench import Bench

from ladezeit.system.files import cache_folder


def main() -> None:
    """Write all that is generated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-peers", action="store_true", help="keep what is known of the libraries")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ladezeit-faults-") as scratch:
        bench = Bench(cache_folder(), Path(scratch) / "bench")
        caught = tables.catches(bench.run())
        if not arguments.no_peers:
            noticed = {name: peers.noticed(name, bench.checkpoint, Path(scratch)) for name in peers.PEERS}
            write(tables.PEERS, {"versions": peers.versions(), "noticed": noticed})
    write(tables.CATCHES, caught)
    noticed = json.loads(tables.PEERS.read_text())
    tables.DOCUMENT.write_text(tables.rendered(tables.DOCUMENT.read_text(), caught, noticed, tables.costs()))


def write(path: Path, content: object) -> None:
    """Write plain data as the repository keeps it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
