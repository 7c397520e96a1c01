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

from annformer.kernels import mix_in_place
from annformer.masking_kernels import ODD, asked_last, hide_levels, smallest_hashes
from annformer.tokens import Profile, TokenBatch

HIDDEN_VALUE = -1.0
"""What the network reads in the place of a hidden value."""


def hide_values(tokens: TokenBatch, share: float, *, seed: int, step: int = 0) -> TokenBatch:
    """Masked-value mode: hide the values of int(n * share) of the n genes of each cell; what was hidden becomes the target.

    The genes stay visible. Unlike here, the original's fine-tuning counts `<cls>` among the candidates.
    """
    chosen = _choose(tokens, share, seed, step)
    hidden = torch.from_numpy(chosen)
    return tokens._replace(
        values=tokens.values.masked_fill(hidden, HIDDEN_VALUE),
        targets=tokens.values.masked_fill(~hidden, torch.nan),
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
    places, n_asked = asked_last(chosen, offsets)
    order, asked = torch.from_numpy(places), torch.from_numpy(chosen[places])
    values = tokens.values[order]
    moved = {name: value[order] for name in ("gene_ids", "flags", "dose", "modality") if (value := getattr(tokens, name)) is not None}
    return tokens._replace(
        values=values.masked_fill(asked, 0.0),
        targets=values.masked_fill(~asked, torch.nan),
        n_visible=torch.from_numpy(np.diff(offsets) - n_asked),
        profile=_without(tokens, chosen),
        **moved,
    )


def _without(tokens: TokenBatch, chosen: Bool[ndarray, "token"]) -> Profile | None:
    """Hide the chosen genes of each cell in its profile, and make the others louder: its length shall not tell how many are hidden."""
    if (profile := tokens.profile) is None:
        return None
    given = (tokens.offsets.numpy(), tokens.gene_ids.numpy(), chosen)
    levels = hide_levels(*given, profile.offsets.numpy(), profile.gene_ids.numpy(), profile.levels.numpy())
    return profile._replace(levels=torch.from_numpy(levels))


def _choose(tokens: TokenBatch, share: float, seed: int, step: int) -> Bool[ndarray, "token"]:
    """Mark int(n * share) genes of each cell."""
    assert 0 <= share <= 1, f"a share of genes lies between 0 and 1, not {share}"
    values = tokens.values.numpy().view(np.uint32)
    return smallest_hashes(tokens.offsets.numpy(), tokens.gene_ids.numpy().view(np.uint64), values, share, _run_key(seed, step))


def _run_key(seed: int, step: int) -> np.uint64:
    key = np.array([seed], np.uint64) + ODD
    mix_in_place(key)
    key += np.uint64(step)
    mix_in_place(key)
    return key[0]
