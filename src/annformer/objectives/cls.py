"""CLS: cell type classification."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from annformer.model.config import ModelConfig
from annformer.objectives.protocol import Encode, Loss, Objective, ObjectiveConfig, classifier_head, label_count, label_loss
from annformer.tokens import Encoded, TokenBatch


class CLSConfig(ObjectiveConfig):
    """Settings of the CLS objective."""

    kind: Literal["cls"] = "cls"
    n_classes: int = Field(gt=0)
    n_layers: int = Field(3, gt=0)
    """Linear layers of the head, the last one included."""
    label: str = "cell_type"
    """The label it learns, by its role in `TokenBatch.labels`."""


class CLS(Objective):
    """Cross entropy of the cell type from the cell embedding (scGPT `ClsDecoder`)."""

    config_class = CLSConfig

    def __init__(self, config: CLSConfig, model: ModelConfig) -> None:
        super().__init__(config, model)
        self.label = config.label
        self.layers = classifier_head(model.width, config.n_layers, nn.ReLU)
        self.out = nn.Linear(model.width, config.n_classes)

    def predict(self, encoded: Encoded) -> Float[Tensor, "cell class"]:
        """Logits per cell."""
        return self.out(self.layers(encoded.cell))

    def losses(self, encoded: Encoded, tokens: TokenBatch, encode: Encode) -> dict[str, Loss]:  # noqa: ARG002
        """`cls`."""
        return {"cls": label_loss(self.predict(encoded), tokens, self.label)}

    def counts(self, tokens: TokenBatch) -> dict[str, Int[Tensor, ""]]:
        """Count labelled cells."""
        return {"cls": label_count(tokens, self.label)}
