"""GEPC: gene expression prediction for cell modelling, each asked gene from the cell embedding."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from annformer.model.config import ModelConfig
from annformer.objectives.protocol import Encode, Loss, Objective, ObjectiveConfig, Prediction, expression_counts, expression_losses, take
from annformer.tokens import Encoded, TokenBatch


class GEPCConfig(ObjectiveConfig):
    """Settings of the GEPC objective."""

    kind: Literal["gepc"] = "gepc"
    detach_genes: bool = False
    """Do not let this objective's gradient reach the gene embeddings ("inner product, detach")."""
    zero_probability: bool = False
    """Predict beside the value the probability that it is not zero."""
    context_in_query: bool = False
    """Append the context to the gene's embedding too (the original's multi-omic model)."""


class GEPC(Objective):
    """Inner product of a gene query with the cell embedding (scGPT `MVCDecoder`, "inner product").

    The product is taken as (c W) q, once per cell, and not as c (W q), once per token.
    """

    config_class = GEPCConfig

    def __init__(self, config: GEPCConfig, model: ModelConfig) -> None:
        super().__init__(config, model)
        self.config = config
        width = model.head_width if config.context_in_query else model.width
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, model.head_width, bias=False)
        self.nonzero = nn.Linear(width, model.head_width) if config.zero_probability else None

    def predict(self, encoded: Encoded, tokens: TokenBatch) -> Prediction:
        """Predicted expression at every encoded row, from the cell embedding alone."""
        genes = encoded.genes.detach() if self.config.detach_genes else encoded.genes
        cell = encoded.cell
        if encoded.context is not None:
            cell = torch.cat((cell, encoded.context[tokens.offsets[:-1]]), -1)
            if self.config.context_in_query:
                genes = torch.cat((genes, encoded.context), -1)
        query = torch.sigmoid(self.query(take(genes, encoded.rows)))
        of = take(tokens.cell_of_token(), encoded.rows)
        value = (query * (cell @ self.value.weight)[of]).sum(-1)
        if self.nonzero is None:
            return Prediction(value)
        return Prediction(value, (query * (cell @ self.nonzero.weight)[of]).sum(-1) + (cell @ self.nonzero.bias)[of])

    def of_genes(
        self, cell: Float[Tensor, "cell width"], context: Float[Tensor, "cell width"] | None, genes: Float[Tensor, "gene width"]
    ) -> Float[Tensor, "cell gene"]:
        """Values of the same genes for every cell, from cell states, their contexts and gene embeddings."""
        assert not self.config.context_in_query, "with the context in its query a gene has another one in every cell"
        state = cell if context is None else torch.cat((cell, context), -1)
        return (state @ self.value.weight) @ torch.sigmoid(self.query(genes)).T

    def losses(self, encoded: Encoded, tokens: TokenBatch, encode: Encode) -> dict[str, Loss]:  # noqa: ARG002
        """`gepc`, `gepc_nonzero`."""
        return expression_losses(self.predict(encoded, tokens), encoded, tokens, "gepc")

    def counts(self, tokens: TokenBatch) -> dict[str, Int[Tensor, ""]]:
        """Count asked genes."""
        return expression_counts(tokens, "gepc", zero_probability=self.config.zero_probability)
