"""ECS: elastic cell similarity."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field

from annformer.model.config import ModelConfig
from annformer.objectives.protocol import Encode, Loss, Objective, ObjectiveConfig
from annformer.tokens import Encoded, TokenBatch


class ECSConfig(ObjectiveConfig):
    """Settings of the ECS objective."""

    kind: Literal["ecs"] = "ecs"
    weight: float = Field(10.0, ge=0)
    threshold: float = Field(0.3, ge=0, le=1)
    """Cosine similarity above which two cells are pulled together and below which they are pushed apart."""


class ECS(Objective):
    """Pull similar cells together, push dissimilar ones apart: mean over pairs of 1 - (relu(cos) - threshold)^2 (scGPT, Methods)."""

    config_class = ECSConfig

    def __init__(self, config: ECSConfig, model: ModelConfig) -> None:
        super().__init__(config, model)
        self.threshold = config.threshold

    def losses(self, encoded: Encoded, tokens: TokenBatch, encode: Encode) -> dict[str, Loss]:  # noqa: ARG002
        """`ecs`; the pairs of a cell with itself count with similarity 0, as in the original."""
        cell = F.normalize(encoded.cell, dim=-1)
        similarity = (cell @ cell.T).fill_diagonal_(0).relu()
        each = 1 - (similarity - self.threshold) ** 2
        return {"ecs": Loss(each.sum(), each.new_tensor(each.numel()))}
