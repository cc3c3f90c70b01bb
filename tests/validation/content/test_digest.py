"""What a digest finds, and that it is the same wherever and in whatever pieces it is made."""

import importlib.util
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladezeit.validation.checksum import ROW_BYTES, ROW_WORDS, flat_chunks, make_multipliers
from ladezeit.validation.digest import DeviceSums, HostSums, digest_tensor, digest_tensors, native_kernel

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.int64,
]
#: Bytes around the borders of words, rows and chunks.
SIZES = [0, 1, 2, 7, 8, 9, ROW_BYTES - 1, ROW_BYTES, ROW_BYTES + 1, 3 * ROW_BYTES + 5, 70 * ROW_BYTES + 13]


def random_bytes(size: int, seed: int = 0) -> torch.Tensor:
    """Return `size` random bytes as a tensor."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def written_out(data: bytes) -> tuple[list[int], list[int]]:
    """Return row and column sums as their definition has them, in Python's own integers."""
    padded = data + bytes(-len(data) % ROW_BYTES)
    words = [int.from_bytes(padded[at : at + 8], "little") for at in range(0, len(padded), 8)]
    rows = [words[at : at + ROW_WORDS] for at in range(0, len(words), ROW_WORDS)]
    table = [int(m) for m in make_multipliers()]
    row_sums = [sum(m * x for m, x in zip(table, row, strict=True)) % 2**64 for row in rows]
    return row_sums, [sum(column) % 2**64 for column in zip(*rows, strict=True)]


def test_multipliers_are_odd_and_all_different() -> None:
    """The guarantees for single words and for swaps rest on this."""
    table = [int(m) for m in make_multipliers()]
    assert len(set(table)) == ROW_WORDS
    assert all(m % 2 == 1 for m in table)


@pytest.fixture(params=["native", "numpy"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernel, and that which takes its place where there was no compiler."""
    if request.param == "numpy":
        monkeypatch.setattr("ladezeit.validation.digest.native_kernel", lambda: None)
    elif native_kernel() is None:
        assert shutil.which("cc") is None, "there is a compiler: install ladezeit again"
        pytest.skip("needs a C compiler when ladezeit is installed")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("size", [size for size in SIZES if size > ROW_BYTES])
def test_sums_are_those_of_their_definition(size: int) -> None:
    """The fast kernels of host and device wrap as the definition says; an overflow is no error and no other value."""
    tensor = random_bytes(size)
    rows, columns = written_out(tensor.numpy().tobytes())
    with ThreadPoolExecutor(2) as pool:
        on_host = HostSums(tensor, pool).get_result()
    (on_device,) = DeviceSums([tensor]).get_results()
    for found in (on_host, on_device):
        assert found[0].tolist() == rows
        assert found[1].tolist() == columns


@settings(max_examples=60)
@given(size=st.sampled_from(SIZES[1:]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(*, size: int, place: float, bit: int) -> None:
    """One bit anywhere, the highest of a word too, changes the digest."""
    tensor = random_bytes(size)
    flipped = tensor.clone()
    flipped[int(place * size)] ^= 1 << bit
    assert digest_tensor(flipped) != digest_tensor(tensor)


def test_every_bit_of_a_small_tensor_counts() -> None:
    """Not a sample of bits: all of them."""
    tensor = random_bytes(2 * 8 + 3)
    seen = {digest_tensor(tensor)}
    for at in range(len(tensor)):
        for bit in range(8):
            flipped = tensor.clone()
            flipped[at] ^= 1 << bit
            seen.add(digest_tensor(flipped))
    assert len(seen) == 1 + 8 * len(tensor)


@settings(max_examples=60)
@given(data=st.data(), width=st.sampled_from([1, 2, 4, 8]), size=st.sampled_from([5 * ROW_BYTES, 70 * ROW_BYTES]))
def test_any_two_swapped_elements_are_found(*, data: st.DataObject, width: int, size: int) -> None:
    """Words that trade places are found wherever they lie, also where they differ in nothing but their sign."""
    element = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[width]
    tensor = torch.ones(size // width, dtype=element)
    one = data.draw(st.integers(0, len(tensor) - 1))
    other = data.draw(st.integers(0, len(tensor) - 1).filter(lambda at: at != one))
    tensor[one] = -1
    swapped = tensor.clone()
    swapped[one], swapped[other] = tensor[other].clone(), tensor[one].clone()
    assert digest_tensor(swapped) != digest_tensor(tensor)


def test_two_flipped_signs_in_one_row_are_found() -> None:
    """The highest bits of words cancel in a row's sum: the column sums are there for that."""
    tensor = torch.ones(4 * ROW_BYTES // 2, dtype=torch.bfloat16)
    negated = tensor.clone()
    negated[3] = negated[11] = -1
    assert digest_tensor(negated) != digest_tensor(tensor)


def test_swapped_rows_and_shifted_bytes_are_found() -> None:
    """A buffer that was filled in another order, or one element late, has another digest."""
    tensor = random_bytes(8 * ROW_BYTES)
    rows = tensor.view(8, ROW_BYTES)
    assert digest_tensor(rows[[1, 0, 2, 3, 4, 5, 6, 7]].reshape(-1)) != digest_tensor(tensor)
    assert digest_tensor(tensor.roll(2)) != digest_tensor(tensor)
    identity = torch.eye(128, dtype=torch.bfloat16)
    assert digest_tensor(identity.flip(0)) != digest_tensor(identity)


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_truncated_tensor_is_found_although_its_end_was_zero(size: int) -> None:
    """Rows are filled up with zeros: the shape in the hash tells a shorter tensor from one that ends in zeros."""
    tensor = random_bytes(size)
    tensor[-1] = 0
    assert digest_tensor(tensor[:-1]) != digest_tensor(tensor)


def test_dtype_and_shape_count() -> None:
    """The same bytes as another dtype or shape are another tensor."""
    tensor = torch.arange(6 * ROW_WORDS, dtype=torch.float32)
    seen = [
        digest_tensor(tensor),
        digest_tensor(tensor.view(torch.int32)),
        digest_tensor(tensor.view(6, -1)),
        digest_tensor(tensor.view(-1, 6)),
    ]
    assert len(set(seen)) == 4


def test_nan_counts_as_its_bits() -> None:
    """A planted NaN is found, and a tensor that holds NaN equals itself."""
    tensor = random_bytes(4 * ROW_BYTES).view(torch.bfloat16)
    planted = tensor.clone()
    planted[777] = float("nan")
    assert digest_tensor(planted) != digest_tensor(tensor)
    assert digest_tensor(planted) == digest_tensor(planted.clone())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 3 * ROW_BYTES])
def test_strided_tensors_count_as_their_elements_in_order(dtype: torch.dtype, size: int) -> None:
    """A transposed, stepped or repeated tensor has the digest of its contiguous copy, in every dtype."""
    tensor = random_bytes(8 * size).fill_(1) if dtype is torch.bool else random_bytes(8 * size)
    tensor = tensor.view(dtype).view(8, -1)
    for strided in (tensor.t(), tensor[:, ::3], tensor[2], tensor[:1].expand(5, -1)):
        assert digest_tensor(strided) == digest_tensor(strided.contiguous())


def test_a_strided_tensor_larger_than_a_piece() -> None:
    """Pieces of a strided tensor end inside a row; nothing is lost between them."""
    tensor = random_bytes(3 * 7 * 5 * 4096).view(torch.float16).view(3, 7, 5, 2048).permute(2, 0, 3, 1)
    pieces = torch.cat(list(flat_chunks(tensor, most_bytes=50_000)))
    assert torch.equal(pieces, tensor.contiguous().view(-1).view(torch.uint8))
    assert len(list(flat_chunks(tensor, most_bytes=50_000))) > 5


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_a_tensor_that_begins_between_two_words(offset: int) -> None:
    """A file may place a tensor at any byte that its dtype allows."""
    data = random_bytes(5 * ROW_BYTES + 16)
    shifted = data[offset : offset + 5 * ROW_BYTES]
    assert digest_tensor(shifted) == digest_tensor(shifted.clone())


@pytest.mark.parametrize("source", ["", "void ladezeit_sums(void) {}", "int nothing_of_ours;"])
def test_a_compiled_file_that_adds_up_otherwise_is_not_used(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another version left behind, or another machine made, must not decide what is proven."""
    made = tmp_path / "_sums.so"
    if source:
        (tmp_path / "sums.c").write_text(source)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(made), str(tmp_path / "sums.c")], check=True)
    else:
        made.write_bytes(b"of another machine")
    spec = importlib.util.spec_from_file_location("_sums", made)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert native_kernel.__wrapped__() is None


@settings(max_examples=20)
@given(
    rows=st.integers(2, 300), task_rows=st.integers(1, 100), chunk_rows=st.integers(1, 70), threads=st.integers(1, 4)
)
def test_pieces_and_threads_do_not_change_the_sums(*, rows: int, task_rows: int, chunk_rows: int, threads: int) -> None:
    """A machine with other caches and more cores finds the same digest."""
    tensor = random_bytes(rows * ROW_BYTES - 3)
    with ThreadPoolExecutor(threads) as pool, pytest.MonkeyPatch.context() as patch:
        usual = HostSums(tensor, pool).get_result()
        patch.setattr("ladezeit.validation.digest.CHUNK_ROWS", chunk_rows)
        patch.setattr("ladezeit.validation.digest.native_kernel", lambda: None)
        other = HostSums(tensor, pool, task_rows=task_rows).get_result()
    (small_chunks,) = DeviceSums([tensor], chunk_bytes=chunk_rows * ROW_BYTES).get_results()
    for found in (other, small_chunks):
        assert np.array_equal(found[0], usual[0])
        assert np.array_equal(found[1], usual[1])


def test_many_tensors_at_once_are_digested_as_each_alone() -> None:
    """Grouping tensors of equal size on a device mixes nothing up."""
    tensors = {str(n): random_bytes((n % 5 + 1) * ROW_BYTES + (n % 7 == 0), seed=n) for n in range(40)}
    tensors["empty"] = torch.empty(0, 3)
    tensors["scalar"] = torch.tensor(3.5)
    found = digest_tensors(tensors)
    assert list(found) == list(tensors)
    assert len(set(found.values())) == len(tensors)
    assert found == {name: digest_tensor(tensor) for name, tensor in tensors.items()}
    large = [tensor for tensor in tensors.values() if tensor.nbytes > ROW_BYTES]
    together = DeviceSums(large).get_results()
    with ThreadPoolExecutor(1) as pool:
        for tensor, (rows, columns) in zip(large, together, strict=True):
            alone = HostSums(tensor, pool).get_result()
            assert np.array_equal(rows, alone[0])
            assert np.array_equal(columns, alone[1])


def test_what_has_no_bytes_is_refused() -> None:
    """A tensor on meta is never given a digest that could equal another's."""
    with pytest.raises(ValueError, match="has no plain bytes"):
        digest_tensors({"lost": torch.empty(3, device="meta")})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_host_and_gpu_find_the_same_digest(dtype: torch.dtype) -> None:
    """A manifest made on the host proves a model on the GPU."""
    longest = 70 * ROW_BYTES + 64  # four elements of any dtype, and a row that is not full
    whole = torch.ones(longest, dtype=torch.uint8) if dtype is torch.bool else random_bytes(longest)
    for size in (64, ROW_BYTES, 2 * ROW_BYTES, longest):
        tensor = whole[:size].view(dtype)
        assert digest_tensor(tensor.cuda()) == digest_tensor(tensor)
        assert digest_tensor(tensor.cuda()[1:]) == digest_tensor(tensor[1:])
        assert digest_tensor(tensor.view(4, -1).cuda().t()) == digest_tensor(tensor.view(4, -1).t())


@pytest.mark.gpu
def test_a_digest_on_the_gpu_takes_little_of_its_memory() -> None:
    """A model that just fits on its GPU can still be proven there."""
    tensor = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    digest_tensor(tensor)
    assert torch.cuda.max_memory_allocated() - before <= 256 * 2**20
    assert torch.cuda.memory_allocated() == before
