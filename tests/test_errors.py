"""Errors: which of them are that memory ran out, whoever raised them and whatever they were wrapped in."""

import errno
import mmap
import os

import numpy as np
import pytest
import torch

from ladezeit.errors import CheckpointError, LoadError, OutOfMemoryError, ran_out_of_memory, says_out_of_memory

#: More than a process has addresses, so that no setting of the system grants it.
FAR_TOO_MUCH = 2**50


def raised(what: object) -> BaseException:
    try:
        what()  # type: ignore[operator]
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(FAR_TOO_MUCH, dtype=torch.uint8),
        lambda: np.empty(FAR_TOO_MUCH, dtype=np.uint8),
        lambda: mmap.mmap(-1, FAR_TOO_MUCH),
        lambda: bytearray(FAR_TOO_MUCH),
    ],
    ids=["torch", "numpy", "mmap", "bytearray"],
)
def test_a_full_host_is_told_by_what_its_allocators_really_raise(allocate: object) -> None:
    """A user reads `oom`, not `failed`, whichever library asked for the memory."""
    assert ran_out_of_memory(raised(allocate))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.00 GiB. GPU 0 has a total capacity of 11.0"),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cudaMalloc(&this->device_buffer, this->buffer_size) failed: out of memory"),
        RuntimeError("buffer_size (8589934592 B) exceeds device memory budget (1048576 B)"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 1024 bytes from file <x>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        MemoryError(),
        OutOfMemoryError("14.00 GiB do not fit on cuda:0"),
    ],
    ids=lambda error: str(error)[:40] or type(error).__name__,
)
def test_a_full_gpu_or_host_is_told_by_type_number_or_words(error: Exception) -> None:
    """What torch, its libraries and the engines say of a full GPU, none of which agree on a type."""
    assert ran_out_of_memory(error)


def test_what_an_error_came_from_counts() -> None:
    """A full GPU stays one behind an engine's own error, raised from it or while it was handled."""

    def from_it() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError as cause:
            raise LoadError("the weights could not be read") from cause

    def while_handled() -> None:
        try:
            from_it()
        except LoadError:
            raise ValueError("the load failed")  # noqa: B904  # as code does that did not expect it

    def from_nothing() -> None:
        try:
            from_it()
        except LoadError:
            raise CheckpointError("shard 2 is missing") from None

    assert ran_out_of_memory(raised(from_it))
    assert ran_out_of_memory(raised(while_handled))
    assert not ran_out_of_memory(raised(from_nothing))


def test_causes_in_a_circle_come_to_an_end() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert not ran_out_of_memory(one)


@pytest.mark.parametrize(
    "error",
    [
        LoadError("loading=x needs 3 GiB: another process is out of memory"),
        OSError(errno.ENOSPC, "out of memory is not what this is"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("size mismatch for model.norm.weight"),
        ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
        KeyboardInterrupt("out of memory"),
    ],
    ids=repr,
)
def test_nothing_else_is_taken_for_it(error: BaseException) -> None:
    """A wrong model or a defect is not excused by a word in its text."""
    assert not ran_out_of_memory(error)


def test_the_words_of_a_process_that_was_aborted_are_read() -> None:
    """A library in C++ that cannot have memory ends the process; only its last words tell."""
    assert says_out_of_memory("terminate called after throwing an instance of 'std::bad_alloc'")
    assert not says_out_of_memory("terminate called after throwing an instance of 'std::logic_error'")
