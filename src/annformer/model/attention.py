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

HALF = (torch.bfloat16, torch.float16)
NEVER = -3e4
"""A score that no softmax sees and that float16 can hold."""


class Keys(NamedTuple):
    """The same layout as a variable-length flash kernel wants it, on the device."""

    order: Int[Tensor, "key"]
    """The visible tokens of each cell and, where a token is asked, the number of tokens: the place of the unit key."""
    query_offsets: Int[Tensor, "cell+1"]
    key_offsets: Int[Tensor, "cell+1"]


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
    keys: Keys | None
    """On a GPU."""

    @classmethod
    def of(cls, tokens: TokenBatch) -> Layout:
        """All tokens query."""
        lengths, n_visible = torch.stack((tokens.offsets.diff(), tokens.n_visible)).tolist()
        return cls._all(tokens, lengths, n_visible)

    @classmethod
    def of_cells(cls, tokens: TokenBatch) -> tuple[Layout, Layout]:
        """All tokens query, and only `<cls>` does."""
        every = cls.of(tokens)
        once = [1] * tokens.n_cells
        asked = None if every.asked_rows is None else torch.zeros(tokens.n_cells, dtype=torch.bool, device=tokens.offsets.device)
        only = every._replace(rows=tokens.offsets[:-1], queries=once, visible_queries=once, asked_rows=asked)
        return every, only._replace(keys=only._keys(tokens))

    @classmethod
    def of_marked(cls, tokens: TokenBatch, marked: Bool[Tensor, "token"]) -> tuple[Layout, Layout]:
        """All tokens query, and only the marked ones do; the numbers of both are fetched from the device together."""
        cell = tokens.cell_of_token()
        visible = _is_visible(tokens, cell)
        counts = torch.zeros(2, tokens.n_cells, dtype=torch.long, device=cell.device)
        counts.index_add_(1, cell, torch.stack((marked, marked & visible)).long())
        numbers = torch.cat((torch.stack((tokens.offsets.diff(), tokens.n_visible)), counts)).tolist()
        every = cls._all(tokens, *numbers[:2])
        rows = torch.argsort(~marked, stable=True)[: sum(numbers[2])]  # as nonzero, but its length is known
        asked = None if every.asked_rows is None else ~visible[rows]
        only = every._replace(rows=rows, queries=numbers[2], visible_queries=numbers[3], asked_rows=asked)
        return every, only._replace(keys=only._keys(tokens, counts[0]))

    @classmethod
    def _all(cls, tokens: TokenBatch, lengths: list[int], n_visible: list[int]) -> Layout:
        asked = ~_is_visible(tokens, tokens.cell_of_token()) if lengths != n_visible else None
        layout = cls(lengths, n_visible, None, lengths, n_visible, asked, None)
        return layout._replace(keys=layout._keys(tokens, tokens.offsets.diff()))

    def _keys(self, tokens: TokenBatch, queries: Int[Tensor, "cell"] | None = None) -> Keys | None:
        return _flash_keys(self, tokens, queries) if tokens.offsets.is_cuda else None

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
    if not len(q):  # a rank may have no cells in its turn
        return q
    run = BACKENDS[backend or _choose(q, layout)]
    if not q.is_cpu or q.dtype not in HALF:
        return run(q, k, v, layout, dropout)
    with torch.autocast("cpu", enabled=False):  # a CPU's kernel is slower backwards in bfloat16 than in float32, and less exact
        return run(q.float(), k.float(), v.float(), layout, dropout).to(q.dtype)


def _choose(q: Tensor, layout: Layout) -> str:
    if q.is_cuda and q.dtype in HALF:
        return "varlen"
    return "dense" if layout.alike else "per_cell"


def _own(x: Tensor, layout: Layout) -> Tensor:
    """For every query its own entry of `x`, the keys or values of all tokens."""
    return x if layout.rows is None else x.index_select(0, layout.rows)


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
    """All cells alike: one batched call for the visible queries, one for the asked. `split` as in `_per_cell`."""
    cells, visible, mine = len(layout.lengths), layout.n_visible[0], layout.visible_queries[0]
    q, k, v, own_k, own_v = (x.view(cells, -1, *x.shape[1:]) for x in (q, k, v, _own(k, layout), _own(v, layout)))
    queries = [mine, q.shape[1] - mine]
    seen, asked = q.split(queries, 1)
    k, v = (x.split([visible, x.shape[1] - visible], 1)[0] for x in (k, v))
    parts = []
    if queries[0]:
        parts.append(_over_visible(seen, k, v, dropout))
    if queries[1]:
        parts.append(_over_visible_and_self(asked, k, v, own_k.split(queries, 1)[1], own_v.split(queries, 1)[1], dropout))
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


def _is_visible(tokens: TokenBatch, cell: Int[Tensor, "token"]) -> Bool[Tensor, "token"]:
    return torch.arange(tokens.n_tokens, device=cell.device) < (tokens.offsets[:-1] + tokens.n_visible)[cell]


def _flash_keys(layout: Layout, tokens: TokenBatch, queries: Int[Tensor, "cell"] | None) -> Keys:
    """Nothing here waits for the device: all sizes are known.

    Parameters
    ----------
    queries
        Number of queries per cell; None: one each.
    """
    unit = int(layout.asked_rows is not None)
    n_keys = tokens.n_visible + unit
    total = sum(layout.n_visible) + unit * tokens.n_cells
    ends = n_keys.cumsum(0)
    index = torch.arange(total, device=ends.device) + torch.repeat_interleave(
        tokens.offsets[:-1] - (ends - n_keys), n_keys, output_size=total
    )
    if unit:
        index.index_fill_(0, ends - 1, tokens.n_tokens)
    query_ends = torch.arange(1, tokens.n_cells + 1, device=ends.device) if queries is None else queries.cumsum(0)
    return Keys(index, *(F.pad(x, (1, 0)).to(torch.int32) for x in (query_ends, ends)))


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout: float) -> Tensor:
    """One variable-length flash call for all cells; visible queries get a score for the own-key column that no softmax sees.

    The own score stands in two coordinates, rounded to half precision and what the rounding left.
    """
    if dropout:
        msg = "attention_dropout is not available in the variable-length back end: set it to 0 in the ModelConfig"
        raise NotImplementedError(msg)
    assert layout.keys is not None, "a layout of a batch on a GPU has them"
    order, q_offsets, k_offsets = layout.keys
    n_queries, n_keys = max(layout.queries, default=0), max(layout.n_visible, default=0) + 1
    depth = q.shape[-1]
    if layout.asked_rows is None:
        return _varlen_call(q, k.index_select(0, order), v.index_select(0, order), q_offsets, k_offsets, n_queries, n_keys, depth**-0.5)
    asked = layout.asked_rows[:, None, None]
    own_k, own_v = _own(k, layout), _own(v, layout)
    wide = torch.float32 if q.dtype in HALF else q.dtype
    score = torch.where(asked, (q.to(wide) * own_k.to(wide)).sum(-1, keepdim=True), NEVER)
    coarse = score.to(q.dtype)
    extra = 2 + -(depth + 2) % 8  # flash kernels want a depth that is a multiple of 8
    q = F.pad(torch.cat((q, coarse, (score - coarse).to(q.dtype)), -1), (0, extra - 2))
    k, v = (_keyed(x, order, extra, n_ones) for x, n_ones in ((k, 2), (v, 1)))
    out = _varlen_call(q, k, v, q_offsets, k_offsets, n_queries, n_keys, depth**-0.5)
    return out[..., :depth] + torch.where(asked, out[..., depth : depth + 1], 0) * own_v


def _keyed(x: Tensor, order: Int[Tensor, "key"], extra: int, n_ones: int) -> Tensor:
    """Keys or values as `order` says them; the unit one has its ones in the first of the new coordinates."""
    depth = x.shape[-1]
    new = torch.arange(depth + extra, device=x.device)
    unit = ((new >= depth) & (new < depth + n_ones)).to(x.dtype).expand(1, x.shape[1], -1)
    return torch.cat((F.pad(x, (0, extra)), unit)).index_select(0, order)


def _varlen_call(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, max_q: int, max_k: int, scale: float) -> Tensor:
    """Torch's variable-length flash attention; a function of its own so that tests can put a plain loop in its place."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, q_offsets, k_offsets, max_q, max_k, scale=scale)
    assert isinstance(out, Tensor), "without return_aux there is one output"
    return out


Backend = Callable[[Tensor, Tensor, Tensor, Layout, float], Tensor]

BACKENDS: dict[str, Backend] = {"reference": _reference, "dense": _dense, "per_cell": _per_cell, "varlen": _varlen}
"""Name -> back end. A new one is a function and a row here; `tests/model/test_attention.py` then holds it to the reference."""
