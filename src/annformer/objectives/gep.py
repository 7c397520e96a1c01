"""GEP: gene expression prediction, each asked gene from its own state."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from annformer.model.config import ModelConfig
from annformer.objectives.protocol import (
    Encode,
    Loss,
    Objective,
    ObjectiveConfig,
    Prediction,
    expression_counts,
    expression_head,
    expression_losses,
    state_and_context,
)
from annformer.tokens import Encoded, TokenBatch


class GEPConfig(ObjectiveConfig):
    """Settings of the GEP objective."""

    kind: Literal["gep"] = "gep"
    loss: Literal["mse", "ce"] = "mse"
    """Squared error on the bin (the published weights) or cross entropy over bins (the preprint; gives a distribution to sample from)."""
    n_bins: int = Field(51, gt=1)
    """Number of bins with loss='ce', zero included."""
    zero_probability: bool = False
    """Predict beside the value the probability that it is not zero (for tokens with zeros among them)."""
    cell_prompt: bool = False
    """Second pass: predict the asked genes once more with `<cls>` replaced by the cell embedding of the first pass."""


class GEP(Objective):
    """Gene expression prediction (scGPT, Methods: "Gene expression prediction"; MLM/MVM elsewhere)."""

    config_class = GEPConfig

    def __init__(self, config: GEPConfig, model: ModelConfig) -> None:
        super().__init__(config, model)
        self.config = config
        self.value = expression_head(model.head_width, model.width, config.n_bins if config.loss == "ce" else 1)
        self.nonzero = expression_head(model.head_width, model.width) if config.zero_probability else None

    def predict(self, encoded: Encoded) -> Prediction:
        """Predicted expression at every encoded row."""
        x = state_and_context(encoded)
        out = self.value(x)
        nonzero = None if self.nonzero is None else self.nonzero(x).squeeze(-1)
        if self.config.loss == "mse":
            return Prediction(out.squeeze(-1), nonzero)
        bins = torch.arange(out.shape[-1], device=out.device, dtype=out.dtype)
        return Prediction(out.softmax(-1) @ bins, nonzero, out)

    def losses(self, encoded: Encoded, tokens: TokenBatch, encode: Encode) -> dict[str, Loss]:
        """`gep`, `gep_nonzero`, and `gep_cell_prompt` for the second pass (REFERENCE 7.5)."""
        losses = expression_losses(self.predict(encoded), encoded, tokens, "gep")
        if self.config.cell_prompt:
            again = encode(tokens._replace(cell=encoded.cell.detach()))
            losses |= expression_losses(self.predict(again), again, tokens, "gep_cell_prompt")
        return losses

    def counts(self, tokens: TokenBatch) -> dict[str, Int[Tensor, ""]]:
        """Count asked genes."""
        names = ("gep", "gep_cell_prompt") if self.config.cell_prompt else ("gep",)
        return expression_counts(tokens, *names, zero_probability=self.config.zero_probability)
