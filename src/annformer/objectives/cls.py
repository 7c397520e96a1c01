"""CLS: cell type classification."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
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
    class_weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """How much a cell of each class counts; none: all alike."""

    @model_validator(mode="after")
    def _all_weighted(self) -> CLSConfig:
        if self.class_weights and len(self.class_weights) != self.n_classes:
            msg = f"{len(self.class_weights)} class_weights for {self.n_classes} classes"
            raise ValueError(msg)
        return self


class CLS(Objective):
    """Cross entropy of the cell type from the cell embedding (scGPT `ClsDecoder`)."""

    config_class = CLSConfig
    class_weights: Tensor | None

    def __init__(self, config: CLSConfig, model: ModelConfig) -> None:
        super().__init__(config, model)
        self.label = config.label
        weights = torch.tensor(config.class_weights) if config.class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)
        self.layers = classifier_head(model.width, config.n_layers, nn.ReLU)
        self.out = nn.Linear(model.width, config.n_classes)

    def predict(self, encoded: Encoded) -> Float[Tensor, "cell class"]:
        """Logits per cell."""
        return self.of_cells(encoded.cell)

    def of_cells(self, cell: Float[Tensor, "cell width"]) -> Float[Tensor, "cell class"]:
        """Logits of cell embeddings."""
        return self.out(self.layers(cell))

    def losses(self, encoded: Encoded, tokens: TokenBatch, encode: Encode) -> dict[str, Loss]:  # noqa: ARG002
        """`cls`."""
        return {"cls": label_loss(self.predict(encoded), tokens, self.label, self.class_weights)}

    def counts(self, tokens: TokenBatch) -> dict[str, Int[Tensor, ""]]:
        """Count labelled cells."""
        return {"cls": label_count(tokens, self.label)}
