"""CCE: contrastive cell embedding."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from annformer.model.config import ModelConfig
from annformer.objectives.protocol import Encode, Loss, Objective, ObjectiveConfig
from annformer.tokens import Encoded, TokenBatch


class CCEConfig(ObjectiveConfig):
    """Settings of the CCE objective."""

    kind: Literal["cce"] = "cce"
    weight: float = Field(10.0, ge=0)
    temperature: float = Field(0.5, gt=0)


class CCE(Objective):
    """A cell encoded twice under dropout shall be nearer to itself than to the other cells of the batch (scGPT "CCE")."""

    config_class = CCEConfig

    def __init__(self, config: CCEConfig, model: ModelConfig) -> None:
        super().__init__(config, model)
        self.temperature = config.temperature

    def losses(self, encoded: Encoded, tokens: TokenBatch, encode: Encode) -> dict[str, Loss]:
        """`cce`."""
        first, second = (F.normalize(cell, dim=-1) for cell in (encoded.cell, encode(tokens).cell))
        mine = torch.arange(len(first), device=first.device)
        return {"cce": Loss(F.cross_entropy(first @ second.T / self.temperature, mine, reduction="sum"), first.new_tensor(len(first)))}
