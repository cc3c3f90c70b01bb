"""A shard to stream, and disks that wait or fail."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host_runtime
import pytest
from streamed_for_tests import EXTENT, random_shard


class Gate(threading.Event):
    """What reads from byte `begin` of a file on wait for, those of threads that know no Python too."""

    def __init__(self, begin: int) -> None:
        super().__init__()
        host_runtime.offset("hold").value = begin

    def set(self) -> None:
        host_runtime.offset("hold").value = -1
        super().set()


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
    host_runtime.offset("fail").value = 20 * EXTENT
    yield
    host_runtime.offset("fail").value = -1


@pytest.fixture
def second_half(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No byte from 20 extents on is read until it is set."""
    opened, honest = Gate(20 * EXTENT), os.preadv

    def waiting(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        assert offset < 20 * EXTENT or opened.wait(60)
        return honest(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", waiting)
    yield opened
    opened.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No byte is read until it is set."""
    opened, honest = Gate(0), os.preadv

    def waiting(*arguments: Any) -> int:
        assert opened.wait(60)
        return honest(*arguments)

    monkeypatch.setattr(os, "preadv", waiting)
    yield opened
    opened.set()
