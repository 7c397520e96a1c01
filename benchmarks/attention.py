"""Attention by the visible/asked rule, forward and backward, against a full boolean mask.

    python benchmarks/attention.py

Cells of 1,200 tokens, some of them asked. Each cell has its own mask, so that no token meets another cell;
masks are made before the clock starts.
All ways must first give the same outputs and gradients.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from _timing import alternate, cpu_ratio, machine, print_table, ratio
from annformer.model.attention import Layout, attend
from annformer.tokens import TokenBatch

N_CELLS, N_TOKENS = 4, 1200
SHARES = (0.25, 0.5, 0.75)
BAR = (0.5, 1.5)
TOLERANCE = 1e-5

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


class Size(NamedTuple):
    """A layer's attention."""

    width: int
    n_heads: int


SIZES = (Size(128, 4), Size(512, 8))


def batch(n_tokens: int, share: float) -> TokenBatch:
    """Cells of which a share of the tokens is visible."""
    offsets = torch.arange(N_CELLS + 1) * n_tokens
    n_visible = torch.full((N_CELLS,), round(n_tokens * share))
    n = N_CELLS * n_tokens
    return TokenBatch(torch.zeros(n, dtype=torch.long), torch.zeros(n), None, None, offsets, n_visible, None, None, {}, None)


def by_mask(allowed: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All cells in one call; every pair of tokens is computed and the mask forgets what is not allowed."""
    cells = (x.view(N_CELLS, -1, *x.shape[1:]).transpose(1, 2).contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(*cells, attn_mask=allowed).transpose(1, 2).flatten(0, 1)


def ways(tokens: TokenBatch) -> dict[str, Way]:
    n_tokens, n_visible = tokens.n_tokens // N_CELLS, int(tokens.n_visible[0])
    allowed = (torch.arange(n_tokens) < n_visible) | torch.eye(n_tokens, dtype=torch.bool)
    ours = {name: partial(attend, layout=Layout.of(tokens), backend=name) for name in ("per_cell", "dense")}
    return {"mask": partial(by_mask, allowed), **ours}


def leaves(n_tokens: int, size: Size) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shape = (N_CELLS * n_tokens, size.n_heads, size.width // size.n_heads)
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for _ in range(3))


def step(way: Way, qkv: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients."""
    out = way(*qkv)
    return out.detach(), *torch.autograd.grad(out, qkv, gradient)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference, as a share of the largest number."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def rows(size: Size, share: float, n_tokens: int, rounds: int) -> Iterator[list[object]]:
    tokens, qkv = batch(n_tokens, share), leaves(n_tokens, size)
    gradient = torch.randn_like(qkv[0])
    steps = {name: partial(step, way, qkv, gradient) for name, way in ways(tokens).items()}
    expected = steps["mask"]()
    off = {name: difference(run(), expected) for name, run in steps.items()}
    if max(off.values()) > TOLERANCE:
        sys.exit(f"the ways differ by {off}: no ratio is printed")
    took = alternate({name: lambda _, run=run: run() for name, run in steps.items()}, n=rounds)
    for name in ("per_cell", "dense"):
        faster = ratio(took["mask"], took[name])
        bar, met = (BAR[1], faster >= BAR[1]) if share == BAR[0] else ("", "")
        times = [1000 * took[way].seconds / N_CELLS for way in ("mask", name)]
        yield [f"{size.width}, {size.n_heads} heads", share, name, *times, faster, cpu_ratio(took["mask"], took[name]), bar, met, off[name]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--n_tokens", type=int, default=N_TOKENS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = [row for size in SIZES for share in SHARES for row in rows(size, share, options.n_tokens, options.rounds)]
    columns = ["width", "visible", "back end", "mask, ms/cell", "ours, ms/cell", "ratio", "ratio (CPU)", "bar", "met", "difference"]
    print_table(f"Attention forward and backward, {N_CELLS} cells of {options.n_tokens:,} tokens. One thread.", columns, table)
    print(f"\nMedians of {options.rounds} alternating rounds. {machine()}.")


if __name__ == "__main__":
    main()
