"""What a cell embedding reads beside the tokens: the expression of a panel of genes, as it is."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

HIDDEN = 256
DROPPED = 0.2
"""Share of the genes that a training step does not see: what one gene says must also be known from others."""


class ExpressionView(nn.Module):
    """Log-normalised expression -> a term of the cell embedding.

    Bins tell the order of a cell's values and, counts being small, much of that order is a draw between ties: `<cls>` sees through noise
    what a linear method reads off. This is that reading, so that a fine-tuned cell embedding contains the simple method. It begins at 0:
    the model begins as what it was.

    Parameters
    ----------
    n_genes
        Genes of the panel.
    width
        Of the cell embedding.
    """

    mean: Tensor

    def __init__(self, n_genes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_genes))
        self.hidden = nn.Linear(n_genes, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.out = nn.Linear(HIDDEN, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, expression: Float[Tensor, "cell panel"]) -> Float[Tensor, "cell width"]:
        """Read cells; a gene that was not measured (NaN) is taken to be at its mean."""
        x = torch.nan_to_num(expression - self.mean)
        x = nn.functional.dropout(x, DROPPED, self.training)
        return self.out(nn.functional.gelu(self.norm(self.hidden(x.to(self.hidden.weight.dtype)))))
