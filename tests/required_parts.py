"""What some tests need of a machine: a browser, a database, a compiler."""

import os
from typing import Any

import pytest


def require(found: Any, missing: str) -> None:
    """Skip where a part is not installed; fail where everything is meant to be there."""
    if found:
        return
    if os.environ.get("LADEZEIT_REQUIRE_ALL") == "1":
        pytest.fail(f"{missing} (LADEZEIT_REQUIRE_ALL=1)")
    pytest.skip(missing)
