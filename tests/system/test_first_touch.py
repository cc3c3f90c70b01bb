"""Memory is touched before a load and given back: a sample neither pays for it nor loses it."""

import psutil
import pytest

from ladezeit.system import memory_warmup
from ladezeit.system.memory_warmup import touch_free_memory


def test_what_was_touched_is_given_back() -> None:
    """The memory that a load will need is free again when the load starts."""
    process = psutil.Process()
    before = process.memory_info().rss
    faults = _page_faults()
    assert touch_free_memory(300 * 2**20) == 300 * 2**20
    assert process.memory_info().rss - before < 50 * 2**20
    assert _page_faults() > faults  # it was really touched, whatever the size of its pages


def test_no_more_than_what_is_free_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model larger than free memory does not push out the page cache that was just set."""
    monkeypatch.setattr(memory_warmup, "_SPARED_BYTES", psutil.virtual_memory().free - 64 * 2**20)
    assert touch_free_memory(2**60) <= 80 * 2**20
    monkeypatch.setattr(memory_warmup, "_SPARED_BYTES", 2**60)
    assert touch_free_memory(2**30) == 0


def test_an_old_kernel_is_served_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.14 memory is touched all the same."""
    monkeypatch.setattr(memory_warmup, "MADV_POPULATE_WRITE", 9999)
    faults = _page_faults()
    assert touch_free_memory(16 * 2**20) == 16 * 2**20
    assert _page_faults() > faults


def _page_faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
