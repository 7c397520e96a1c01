"""The part of the cell embedding that is linear in expression: what PCA would have said, had it seen the cells of the pretraining."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from annformer.tokens import Profile

SHARE = 1 / 32
"""Of the table that becomes a direction: one step of an optimiser that moves all numbers alike shall turn the directions, of which many
add up, no faster than the rows of the gene table."""


class ExpressionProfile(nn.Module):
    """The sum of a learned direction of each expressed gene, times the gene's log-normalised expression.

    Value bins order the values of one cell, and counts being small, most of that order is a draw between ties: `<cls>` has to see through
    noise what a linear method reads off. The table is begun at the principal axes of the cells of the pretraining
    (`train.gene_init.principal_axes`), so that the cell embedding begins at least as good as those, and trained with all other weights.

    Parameters
    ----------
    vocab_size
        Rows of the gene table.
    width
        Of the cell embedding.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.gene = nn.Embedding(vocab_size, width)
        self.origin = nn.Parameter(torch.zeros(width))
        """Minus what a mean cell has, so that cells lie around 0."""
        nn.init.zeros_(self.gene.weight)

    def forward(self, profile: Profile) -> Float[Tensor, "cell width"]:
        """Read cells."""
        weight = self.gene.weight
        levels = profile.levels.to(weight.dtype)
        summed = F.embedding_bag(profile.gene_ids, weight, profile.offsets[:-1], mode="sum", per_sample_weights=levels)
        return SHARE * summed + self.origin
