"""A reference load that asks torch's host allocator for as many bytes as it is told to."""

import sys
from typing import Any

from ladezeit.system.processes import answer_request


def make(request: dict[str, Any]) -> dict[str, Any]:
    """Return how many bytes were had."""
    import torch

    if "says" in request:
        raise RuntimeError(request["says"])
    return {"had_bytes": torch.empty(request["ask_for_bytes"], dtype=torch.uint8).numel()}


if __name__ == "__main__":
    sys.exit(answer_request(make, sys.argv[1:]))
