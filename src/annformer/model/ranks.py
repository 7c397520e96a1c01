"""What couples the cells of several processes: sums and rows of all of them, through which gradients flow back.

Every function is the identity in a single process. In several, all of them have to call it together, in the same order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


class Gathered(NamedTuple):
    """Rows of all ranks, in the order of the ranks."""

    rows: Float[Tensor, "row width"]
    first: int
    """Where this rank's own rows begin."""


def n_ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of `x` over ranks; the gradient of each rank is summed likewise, as every rank's loss may depend on every rank's part."""
    return x if n_ranks() == 1 else _Sum.apply(x)  # type: ignore[no-untyped-call]


def gather_rows(rows: Float[Tensor, "own width"]) -> Gathered:
    """Rows of all ranks, which may have different numbers of them, with gradients to all."""
    if n_ranks() == 1:
        return Gathered(rows, 0)
    sizes = _sizes(rows)
    return Gathered(_Gather.apply(rows, sizes), sum(sizes[: dist.get_rank()]))  # type: ignore[no-untyped-call]


def _sizes(rows: Tensor) -> list[int]:
    sizes = torch.zeros(n_ranks(), dtype=torch.long, device=rows.device)
    sizes[dist.get_rank()] = len(rows)
    dist.all_reduce(sizes)
    return sizes.tolist()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004  # autograd's signature
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ARG004
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.split(ctx.sizes)[dist.get_rank()], None
