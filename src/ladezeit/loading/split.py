"""How a weight is split over ranks: in which dimension, in how many groups, and which part is whose.

A way is written ``dimension`` or ``dimension/groups``: with groups, each of so many equal runs along the dimension is
split by itself and a rank holds its part of every run, as where gate and up projection are one tensor.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: Stands for a way that has no word here: nothing is proven of such a part.
UNKNOWN = "unknown"


def way_of(tensor: Any) -> str | None:
    """Return how the DTensor `tensor` is split over the ranks of its one group; None where every rank holds all of it.

    See torch's ``torch.distributed.tensor.placement_types``.
    """
    if not hasattr(tensor, "device_mesh"):
        return None
    if len(tensor.placements) != 1:
        return UNKNOWN
    (placement,) = tensor.placements
    if placement.is_replicate():
        return None
    if not hasattr(placement, "dim") or placement.is_partial():
        return UNKNOWN
    return way(placement.dim % tensor.dim(), getattr(placement, "split_factor", 1))


def ways(model: Any) -> dict[str, str]:
    """Return how each parameter of `model` that is split is split, by name; tied ones under each of theirs."""
    found = {name: way_of(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {name: one for name, one in found.items() if one is not None}


def way(dimension: int, groups: int) -> str:
    """Return the word for a way."""
    return f"{dimension}/{groups}" if groups > 1 else str(dimension)


def part(whole: "Tensor", way: str, rank: int, ranks: int) -> "Tensor":
    """Return what `rank` of `ranks` holds of `whole`; the last parts are smaller, or empty, where it does not divide.

    Shape: that of `whole`, shorter in the way's dimension. All ranks' parts together are `whole`, each element once.
    """
    import torch

    dimension, _, groups = way.partition("/")
    runs = whole.chunk(int(groups or 1), int(dimension))
    mine = [_run_part(run, int(dimension), rank, ranks) for run in runs]
    return mine[0] if len(mine) == 1 else torch.cat(mine, int(dimension))


def _run_part(run: "Tensor", dimension: int, rank: int, ranks: int) -> "Tensor":
    length = run.shape[dimension]
    size = -(-length // ranks)
    begin = min(rank * size, length)
    return run.narrow(dimension, begin, min(size, length - begin))
