"""TokenBatch -> TokenBatch: which genes keep their value, which are asked for theirs.

Genes are chosen by hash: a cell's key is an order-free sum over the hashes of its (gene, value) pairs, and the genes with the smallest
hashes of (key, gene) are taken. So the choice depends on the cell, the seed and the step alone, not on batch, worker or rank, and no
generator has to be saved to resume. `<cls>` is never chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from numpy import ndarray
from torch import Tensor

from annformer.kernels import GOLDEN, mix_in_place
from annformer.tokens import Profile, TokenBatch

HIDDEN_VALUE = -1.0
"""What the network reads in the place of a hidden value."""

_ODD = np.uint64(0xD6E8FEB86659FD93)


def hide_values(tokens: TokenBatch, share: float, *, seed: int, step: int = 0) -> TokenBatch:
    """Masked-value mode: hide the values of int(n * share) of the n genes of each cell; what was hidden becomes the target.

    The genes stay visible. Unlike here, the original's fine-tuning counts `<cls>` among the candidates.
    """
    chosen = torch.from_numpy(_choose(tokens, share, seed, step))
    return tokens._replace(
        values=tokens.values.masked_fill(chosen, HIDDEN_VALUE),
        targets=tokens.values.masked_fill(~chosen, torch.nan),
        profile=_without(tokens, chosen),
    )


def ask(tokens: TokenBatch, shares: Sequence[float], *, seed: int, step: int = 0) -> TokenBatch:
    """Generative mode: ask for the values of int(n * share) of the n genes of each cell, and move these genes behind the visible ones.

    Parameters
    ----------
    shares
        One of them is drawn per step, for all cells (and all ranks) alike, so that batches of a step cost the same.
    """
    share = shares[int(_run_key(seed, step)) % len(shares)]
    chosen = _choose(tokens, share, seed, step)
    offsets = tokens.offsets.numpy()
    lengths = np.diff(offsets)
    n_asked = np.add.reduceat(chosen, offsets[:-1], dtype=np.int64)
    order = _asked_last(chosen, offsets, n_asked)
    asked = torch.from_numpy(chosen)[order]
    values = tokens.values[order]
    moved = {name: value[order] for name in ("gene_ids", "flags", "dose", "modality") if (value := getattr(tokens, name)) is not None}
    return tokens._replace(
        values=values.masked_fill(asked, 0.0),
        targets=values.masked_fill(~asked, torch.nan),
        n_visible=torch.from_numpy(lengths - n_asked),
        profile=_without(tokens, torch.from_numpy(chosen)),
        **moved,
    )


def _without(tokens: TokenBatch, chosen: Bool[Tensor, "token"]) -> Profile | None:
    """Hide the chosen genes of each cell in its profile, and make the others louder: its length shall not tell how many are hidden."""
    if (profile := tokens.profile) is None or not len(profile.gene_ids):
        return profile
    n_cells, lengths = tokens.n_cells, profile.offsets.diff()
    cell = torch.repeat_interleave(torch.arange(n_cells), lengths)
    n_ids = 1 + int(torch.cat((profile.gene_ids, tokens.gene_ids)).max())
    expressed, hides = cell * n_ids + profile.gene_ids, (tokens.cell_of_token() * n_ids + tokens.gene_ids)[chosen]
    place = torch.searchsorted(expressed, hides).clamp(max=len(expressed) - 1)
    hidden = torch.zeros(len(cell), dtype=torch.bool)
    hidden[place[expressed[place] == hides]] = True  # tokens of zeros stand in no profile
    n_hidden = torch.bincount(cell[hidden], minlength=n_cells)
    louder = lengths / (lengths - n_hidden).clamp(min=1)
    return profile._replace(levels=(profile.levels * louder[cell]).masked_fill(hidden, 0.0))


def _asked_last(chosen: Bool[ndarray, "token"], offsets: ndarray, n_asked: ndarray) -> Tensor:
    """Order of the tokens in which the chosen ones stand last in their cell, otherwise as before."""
    last = np.arange(len(chosen)) >= np.repeat(offsets[1:] - n_asked, np.diff(offsets))
    order = np.empty(len(chosen), np.int64)
    order[last], order[~last] = np.flatnonzero(chosen), np.flatnonzero(~chosen)  # all three go through the cells in the same order
    return torch.from_numpy(order)


def _choose(tokens: TokenBatch, share: float, seed: int, step: int) -> Bool[ndarray, "token"]:
    """Mark int(n * share) genes of each cell."""
    assert 0 <= share <= 1, f"a share of genes lies between 0 and 1, not {share}"
    offsets, gene_ids = tokens.offsets.numpy(), tokens.gene_ids.numpy().view(np.uint64)
    lengths, first = np.diff(offsets), offsets[:-1]
    content = gene_ids * GOLDEN + tokens.values.numpy().view(np.uint32) * _ODD
    mix_in_place(content)
    keys = np.add.reduceat(content, first) + _run_key(seed, step)
    mix_in_place(keys)
    hashes = gene_ids * GOLDEN + np.repeat(keys, lengths)
    mix_in_place(hashes)
    # the cell's number in the highest bits lets one sort order the genes within each cell; all-one bits keep <cls> behind its genes
    cell_bits = np.uint64(len(first).bit_length())
    hashes >>= cell_bits
    hashes[first] = np.uint64(2**64 - 1) >> cell_bits
    hashes |= np.repeat(np.arange(len(first), dtype=np.uint64) << (np.uint64(64) - cell_bits), lengths)
    n_chosen = ((lengths - 1) * share).astype(np.int64)
    smallest_not_chosen = np.sort(hashes)[first + n_chosen]
    return hashes < np.repeat(smallest_not_chosen, lengths)


def _run_key(seed: int, step: int) -> np.uint64:
    key = np.array([seed], np.uint64) + _ODD
    mix_in_place(key)
    key += np.uint64(step)
    mix_in_place(key)
    return key[0]
