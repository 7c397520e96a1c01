"""ECS: elastic cell similarity."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from annformer.model.config import ModelConfig
from annformer.model.ranks import gather_rows, sum_over_ranks
from annformer.objectives.protocol import Encode, Loss, Objective, ObjectiveConfig
from annformer.tokens import Encoded, TokenBatch


class ECSConfig(ObjectiveConfig):
    """Settings of the ECS objective."""

    kind: Literal["ecs"] = "ecs"
    weight: float = Field(10.0, ge=0)
    threshold: float = Field(0.3, ge=0, le=1)
    """Cosine similarity above which two cells are pulled together and below which they are pushed apart."""


class ECS(Objective):
    """Pull similar cells together, push dissimilar ones apart: mean over pairs of 1 - (relu(cos) - threshold)^2 (scGPT, Methods).

    In training the pairs are those of all cells that the ranks encode at the same time.
    """

    config_class = ECSConfig

    def __init__(self, config: ECSConfig, model: ModelConfig) -> None:
        super().__init__(config, model)
        self.threshold = config.threshold

    def losses(self, encoded: Encoded, tokens: TokenBatch, encode: Encode) -> dict[str, Loss]:  # noqa: ARG002
        """`ecs`; the pairs of a cell with itself count with similarity 0, as in the original."""
        cell = F.normalize(encoded.cell, dim=-1)
        others, first = gather_rows(cell) if self.training else (cell, 0)
        mine = torch.arange(len(cell), device=cell.device)
        similarity = cell @ others.T
        similarity[mine, mine + first] = 0
        each = 1 - (similarity.relu() - self.threshold) ** 2
        return {"ecs": Loss(each.sum(), each.new_tensor(each.numel()))}

    def counts(self, tokens: TokenBatch) -> dict[str, Int[Tensor, ""]]:
        """Count the pairs that cells of this batch are the first of."""
        n = tokens.offsets.new_tensor(tokens.n_cells)
        return {"ecs": n * (sum_over_ranks(n) if self.training else n)}
