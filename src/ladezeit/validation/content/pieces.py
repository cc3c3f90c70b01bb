"""A tensor's bytes in the order of its elements, whatever its dtype and strides, never copied as a whole."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: A strided tensor is made contiguous in pieces of about this many bytes.
PIECE_BYTES = 16 * 2**20


def flat_pieces(tensor: "Tensor", most_bytes: int = PIECE_BYTES) -> Iterator["Tensor"]:
    """Yield one-dimensional uint8 tensors that are the bytes of `tensor`, in the order of its elements.

    A contiguous tensor is one piece and not copied.
    """
    plain = tensor.detach().resolve_conj().resolve_neg()
    size = plain.numel() * plain.element_size()
    if size == 0:
        return
    if plain.is_contiguous() or size <= most_bytes:
        yield _as_bytes(plain.contiguous())
        return
    slab_bytes = size // plain.shape[0]
    if slab_bytes > most_bytes:
        for slab in plain:
            yield from flat_pieces(slab, most_bytes)
        return
    step = max(1, most_bytes // slab_bytes)
    for start in range(0, plain.shape[0], step):
        yield _as_bytes(plain[start : start + step].contiguous())


def _as_bytes(contiguous: "Tensor") -> "Tensor":
    import torch

    return contiguous.reshape(-1).view(torch.uint8)


def size_bytes(tensor: "Tensor") -> int:
    """Return the bytes of all elements of `tensor`, strides and storage aside."""
    return int(tensor.numel() * tensor.element_size())
