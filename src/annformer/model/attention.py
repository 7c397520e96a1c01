"""The attention rule of the paper, with several back ends that tests prove equal.

Every token attends to the visible tokens of its own cell and to itself (scGPT, Methods: "attention only to known genes and oneself").
No mask is ever built: a packed batch says by its offsets who may look at whom, so the cost is tokens x visible.

A visible token takes plain attention over the visible tokens. An asked token sees one key more, its own, and every asked token has another.
**The own-key column** puts all of them into one call: queries and keys get one more coordinate, the key list gets one more entry, the
unit vector of that coordinate, and the query's entry there is its score with its own key. The value list gets the unit vector too, so the
output's last coordinate is the attention weight on oneself, which multiplies the token's own value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from annformer.tokens import TokenBatch


class Layout(NamedTuple):
    """Who asks whom in a packed batch, as plain numbers: read from the device once per batch, not once per layer."""

    lengths: list[int]
    """Tokens per cell."""
    n_visible: list[int]
    """Visible tokens per cell."""
    rows: Int[Tensor, "row"] | None
    """The tokens that query, ascending; None: all."""
    queries: list[int]
    """Querying tokens per cell, and of these"""
    visible_queries: list[int]
    """the visible ones, which stand first."""
    asked_rows: Bool[Tensor, "row"] | None
    """Which queries are asked tokens; None: none is."""

    @classmethod
    def of(cls, tokens: TokenBatch) -> Layout:
        """All tokens query."""
        lengths, n_visible = torch.stack((tokens.offsets.diff(), tokens.n_visible)).tolist()
        asked = None
        if lengths != n_visible:
            cell = tokens.cell_of_token()
            asked = torch.arange(tokens.n_tokens, device=cell.device) >= (tokens.offsets[:-1] + tokens.n_visible)[cell]
        return cls(lengths, n_visible, None, lengths, n_visible, asked)

    def only(self, rows: Int[Tensor, "row"], tokens: TokenBatch) -> Layout:
        """Only `rows` query, everything visible still answers."""
        cell = torch.bucketize(rows, tokens.offsets[1:], right=True)
        visible = rows < (tokens.offsets[:-1] + tokens.n_visible)[cell]
        counts = torch.stack((torch.bincount(cell, minlength=tokens.n_cells), torch.bincount(cell[visible], minlength=tokens.n_cells)))
        queries, visible_queries = counts.tolist()
        return self._replace(
            rows=rows, queries=queries, visible_queries=visible_queries, asked_rows=None if self.asked_rows is None else ~visible
        )

    @property
    def alike(self) -> bool:
        """Whether all cells have the same numbers, so that the batch is a dense tensor."""
        return all(len(set(n)) == 1 for n in (self.lengths, self.n_visible, self.queries, self.visible_queries))


def attend(
    q: Float[Tensor, "row head depth"],
    k: Float[Tensor, "token head depth"],
    v: Float[Tensor, "token head depth"],
    layout: Layout,
    *,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Float[Tensor, "row head depth"]:
    """Attention of the querying tokens over the visible tokens of their cell and themselves.

    Parameters
    ----------
    q, k, v
        Queries of `layout.rows`, keys and values of all tokens.
    layout
        From `Layout.of`.
    dropout
        On the attention probabilities.
    backend
        A name in `BACKENDS`; None chooses by device, type and layout.

    Returns
    -------
    The attention context, heads not yet merged.
    """
    return BACKENDS[backend or _choose(q, layout)](q, k, v, layout, dropout)


def _choose(q: Tensor, layout: Layout) -> str:
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return "varlen"
    return "dense" if layout.alike else "per_cell"


def _own(x: Tensor, layout: Layout) -> Tensor:
    """For every query its own entry of `x`, the keys or values of all tokens."""
    return x if layout.rows is None else x[layout.rows]


def _reference(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout: float) -> Tensor:
    """The rule as a boolean mask over all pairs: the definition that the others are tested against."""
    n = k.shape[0]
    lengths = torch.tensor(layout.lengths, device=q.device)
    cell = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)
    position = torch.arange(n, device=q.device) - (lengths.cumsum(0) - lengths)[cell]
    visible = position < torch.tensor(layout.n_visible, device=q.device)[cell]
    rows = torch.arange(n, device=q.device) if layout.rows is None else layout.rows
    allowed = (cell[rows, None] == cell) & visible | (rows[:, None] == torch.arange(n, device=q.device))
    out = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=allowed, dropout_p=dropout)
    return out.transpose(0, 1)


def _over_visible(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Plain attention; the axes are (cell, token, head, depth)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":  # its kernel reads rows that lie 3 x width apart 2 % (128 wide) to 4 % (512 wide) slower, copies included
        q, k, v = (x.contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)


def _over_visible_and_self(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, dropout: float) -> Tensor:
    """Attention with the own-key column; the axes are (cell, token, head, depth)."""
    depth = q.shape[-1]
    score = (q * own_k).sum(-1, keepdim=True)
    out = F.scaled_dot_product_attention(
        torch.cat((q, score), -1).transpose(1, 2),
        _with_unit(k).transpose(1, 2),
        _with_unit(v).transpose(1, 2),
        dropout_p=dropout,
        scale=depth**-0.5,
    ).transpose(1, 2)
    return out[..., :depth] + out[..., depth:] * own_v


def _with_unit(x: Tensor) -> Tensor:
    """Append one coordinate, and one token that is the unit vector of that coordinate."""
    x = F.pad(x, (0, 1, 0, 0, 0, 1))
    x[:, -1, :, -1] = 1
    return x


def _dense(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout: float) -> Tensor:
    """All cells alike: one batched call for the visible queries, one for the asked."""
    cells, visible, mine = len(layout.lengths), layout.n_visible[0], layout.visible_queries[0]
    own_k, own_v = (x.view(cells, -1, *x.shape[1:])[:, mine:] for x in (_own(k, layout), _own(v, layout)))
    q, k, v = (x.view(cells, -1, *x.shape[1:]) for x in (q, k, v))
    k, v = k[:, :visible], v[:, :visible]
    parts = []
    if mine:
        parts.append(_over_visible(q[:, :mine], k, v, dropout))
    if mine < q.shape[1]:
        parts.append(_over_visible_and_self(q[:, mine:], k, v, own_k, own_v, dropout))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).flatten(0, 1)


def _interleave(first: list[int], whole: list[int]) -> list[int]:
    """Sizes of the alternating pieces (first, rest) of every cell."""
    return [size for a, n in zip(first, whole, strict=True) for size in (a, n - a)]


def _per_cell(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout: float) -> Tensor:
    """One or two calls per cell. `split` and not slices: its backward is one concatenation, a slice's a whole tensor of zeros."""
    pieces = _interleave(layout.visible_queries, layout.queries)
    keys = _interleave(layout.n_visible, layout.lengths)
    qs = q[None].split(pieces, 1)
    ks, vs = k[None].split(keys, 1)[::2], v[None].split(keys, 1)[::2]
    asked = layout.asked_rows is not None
    own_ks, own_vs = (x[None].split(pieces, 1) if asked else () for x in (_own(k, layout), _own(v, layout)))
    out = []
    for cell, (key, value) in enumerate(zip(ks, vs, strict=True)):
        if pieces[2 * cell]:
            out.append(_over_visible(qs[2 * cell], key, value, dropout))
        if pieces[2 * cell + 1]:
            i = 2 * cell + 1
            out.append(_over_visible_and_self(qs[i], key, value, own_ks[i], own_vs[i], dropout))
    return torch.cat(out, 1)[0]


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout: float) -> Tensor:
    """One variable-length flash call for all cells; visible queries get a score for the own-key column that no softmax sees."""
    if dropout:
        msg = "attention_dropout is not available in the variable-length back end: set it to 0 in the ModelConfig"
        raise NotImplementedError(msg)
    depth = q.shape[-1]
    scale = depth**-0.5
    start = torch.tensor(layout.lengths, device=q.device).cumsum(0) - torch.tensor(layout.lengths, device=q.device)
    n_keys = torch.tensor(layout.n_visible, device=q.device)
    extra = 0
    if layout.asked_rows is not None:
        score = (q * _own(k, layout)).sum(-1, keepdim=True)
        score = torch.where(layout.asked_rows[:, None, None], score, score.new_tensor(-3e4))
        extra = 8 - depth % 8  # flash kernels want a depth that is a multiple of 8
        q = F.pad(torch.cat((q, score), -1), (0, extra - 1))
        n_keys = n_keys + 1
    index = torch.repeat_interleave(start, n_keys) + _ramp(n_keys)
    if extra:
        index[n_keys.cumsum(0) - 1] = k.shape[0]
        own_v = _own(v, layout)
        unit = F.one_hot(torch.tensor(depth, device=k.device), depth + extra).to(k.dtype).expand(1, k.shape[1], -1)
        k, v = (torch.cat((F.pad(x, (0, extra)), unit)) for x in (k, v))
    queries = torch.tensor(layout.queries, device=q.device)
    out = _varlen_call(
        q, k[index], v[index], _cumulative(queries), _cumulative(n_keys), max(layout.queries), max(layout.n_visible) + 1, scale
    )
    if not extra:
        return out
    weight = torch.where(layout.asked_rows[:, None, None], out[..., depth : depth + 1], 0)  # type: ignore[index]  # extra says it is there
    return out[..., :depth] + weight * own_v


def _ramp(counts: Int[Tensor, "cell"]) -> Int[Tensor, "key"]:
    """0, 1, ... counts[0]-1, 0, 1, ... for every cell."""
    total = int(counts.sum())
    return torch.arange(total, device=counts.device) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)


def _cumulative(counts: Int[Tensor, "cell"]) -> Int[Tensor, "cell+1"]:
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _varlen_call(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, max_q: int, max_k: int, scale: float) -> Tensor:
    """Torch's variable-length flash attention; a function of its own so that tests can put a plain loop in its place."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, q_offsets, k_offsets, max_q, max_k, scale=scale)
    assert isinstance(out, Tensor), "without return_aux there is one output"
    return out


Backend = Callable[[Tensor, Tensor, Tensor, Layout, float], Tensor]

BACKENDS: dict[str, Backend] = {"reference": _reference, "dense": _dense, "per_cell": _per_cell, "varlen": _varlen}
"""Name -> back end. A new one is a function and a row here; `tests/model/test_attention.py` then holds it to the reference."""
