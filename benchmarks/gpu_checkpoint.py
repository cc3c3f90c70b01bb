"""Writes a model's checkpoint into ladezeit's cache folder, beside what else runs: `gpu.py` starts it early.

    python benchmarks/gpu_checkpoint.py MODEL

Output: one JSON document: folder, bytes, seconds.
"""

import json
import sys
import time

from ladezeit.checkpoint.resolve import prepare_checkpoint
from ladezeit.serving.request import model_of
from ladezeit.system.files import cache_folder


def main() -> None:
    """Write it, or find it there."""
    started = time.monotonic()
    checkpoint = prepare_checkpoint(model_of(sys.argv[1]), cache_folder())
    seconds = round(time.monotonic() - started, 2)
    print(json.dumps({"folder": str(checkpoint.folder), "bytes": checkpoint.file_bytes, "seconds": seconds}))


if __name__ == "__main__":
    main()
