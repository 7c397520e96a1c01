"""CCE: contrastive cell embedding."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from annformer.model.config import ModelConfig
from annformer.model.ranks import gather_rows
from annformer.objectives.protocol import Encode, Loss, Objective, ObjectiveConfig
from annformer.tokens import Encoded, TokenBatch


class CCEConfig(ObjectiveConfig):
    """Settings of the CCE objective."""

    kind: Literal["cce"] = "cce"
    weight: float = Field(10.0, ge=0)
    temperature: float = Field(0.5, gt=0)


class CCE(Objective):
    """A cell encoded twice under dropout shall be nearer to itself than to the other cells of the batch (scGPT "CCE").

    In training the others are all cells that the ranks encode at the same time.
    """

    config_class = CCEConfig

    def __init__(self, config: CCEConfig, model: ModelConfig) -> None:
        super().__init__(config, model)
        self.temperature = config.temperature

    def losses(self, encoded: Encoded, tokens: TokenBatch, encode: Encode) -> dict[str, Loss]:
        """`cce`."""
        first, second = (F.normalize(cell, dim=-1) for cell in (encoded.cell, encode(tokens).cell))
        others, own = gather_rows(second) if self.training else (second, 0)
        mine = torch.arange(len(first), device=first.device) + own
        return {"cce": Loss(F.cross_entropy(first @ others.T / self.temperature, mine, reduction="sum"), first.new_tensor(len(first)))}

    def counts(self, tokens: TokenBatch) -> dict[str, Int[Tensor, ""]]:
        """Count cells."""
        return {"cce": tokens.offsets.new_tensor(tokens.n_cells)}
