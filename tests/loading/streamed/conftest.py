"""A shard to stream, and disks that wait or fail."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streamed_for_tests import EXTENT, random_shard


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return random_shard(tmp_path / "model.safetensors")


@pytest.fixture
def io_error(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk that fails from 20 extents on."""
    honest = os.preadv

    def failing(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        if offset >= 20 * EXTENT:
            raise OSError(5, "Input/output error")
        return honest(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", failing)
    yield


@pytest.fixture
def second_half(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No byte from 20 extents on is read until it is set."""
    opened, honest = threading.Event(), os.preadv

    def waiting(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        assert offset < 20 * EXTENT or opened.wait(60)
        return honest(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", waiting)
    yield opened
    opened.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No byte is read until it is set."""
    opened, honest = threading.Event(), os.preadv

    def waiting(*arguments: Any) -> int:
        assert opened.wait(60)
        return honest(*arguments)

    monkeypatch.setattr(os, "preadv", waiting)
    yield opened
    opened.set()
