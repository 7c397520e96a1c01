"""DAR: domain adaptation by gradient reversal."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from annformer.model.config import ModelConfig
from annformer.objectives.protocol import Encode, Loss, Objective, ObjectiveConfig, classifier_head, label_count, label_loss
from annformer.tokens import Encoded, TokenBatch


class DARConfig(ObjectiveConfig):
    """Settings of the DAR objective."""

    kind: Literal["dar"] = "dar"
    n_batches: int = Field(gt=0)
    n_layers: int = Field(3, gt=0)
    label: str = "batch"
    """What must not be readable from the cell embedding, by its role in `TokenBatch.labels`."""


class DAR(Objective):
    """A discriminator learns the experimental batch from the cell embedding, the network learns to hide it (scGPT "DAR"; DAB elsewhere)."""

    config_class = DARConfig

    def __init__(self, config: DARConfig, model: ModelConfig) -> None:
        super().__init__(config, model)
        self.label = config.label
        self.layers = classifier_head(model.width, config.n_layers, nn.LeakyReLU)
        self.out = nn.Linear(model.width, config.n_batches)

    def predict(self, encoded: Encoded) -> Float[Tensor, "cell batch"]:
        """Logits per cell; the gradient that passes to the cell embedding is reversed."""
        cell = _ReverseGradient.apply(encoded.cell)  # type: ignore[no-untyped-call]
        return self.out(self.layers(cell))

    def losses(self, encoded: Encoded, tokens: TokenBatch, encode: Encode) -> dict[str, Loss]:  # noqa: ARG002
        """`dar`."""
        return {"dar": label_loss(self.predict(encoded), tokens, self.label)}

    def counts(self, tokens: TokenBatch) -> dict[str, Int[Tensor, ""]]:
        """Count cells with a known batch."""
        return {"dar": label_count(tokens, self.label)}


class _ReverseGradient(torch.autograd.Function):
    """Identity forward, minus one times the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004  # autograd's signature
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ARG004
        return -gradients[0]
