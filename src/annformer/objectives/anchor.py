"""Anchor: a cell embedding is drawn to where the cells like it lie in every batch."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from annformer.model.config import ModelConfig
from annformer.objectives.protocol import Encode, Loss, Objective, ObjectiveConfig
from annformer.tokens import Encoded, TokenBatch


class AnchorConfig(ObjectiveConfig):
    """Settings of the anchor objective."""

    kind: Literal["anchor"] = "anchor"
    n_components: int = Field(50, gt=0)
    """Length of an anchor, and of what the model is then used for: the prediction of the anchor."""


class Anchor(Objective):
    """Squared distance between a linear image of the cell embedding and a place that is known for each training cell.

    What the places are is said by whoever calls `place`; they are no part of the model. Cells without one (a row of NaN) do not count.
    """

    config_class = AnchorConfig
    anchors: Tensor

    def __init__(self, config: AnchorConfig, model: ModelConfig) -> None:
        super().__init__(config, model)
        self.out = nn.Linear(model.width, config.n_components)
        self.register_buffer("anchors", torch.zeros(0, config.n_components), persistent=False)

    def place(self, anchors: Float[Tensor, "row component"]) -> None:
        """Say where each row of the training data belongs."""
        self.anchors = anchors.to(self.out.weight)

    def predict(self, encoded: Encoded) -> Float[Tensor, "cell component"]:
        """Where cells belong."""
        return self.out(encoded.cell)

    def losses(self, encoded: Encoded, tokens: TokenBatch, encode: Encode) -> dict[str, Loss]:  # noqa: ARG002
        """`anchor`: the mean over components."""
        anchors = self._of(tokens)
        known = torch.isfinite(anchors[:, 0])
        distance = (self.predict(encoded).to(anchors.dtype) - torch.nan_to_num(anchors)).square().mean(1)
        return {"anchor": Loss((distance * known).sum(), known.sum())}

    def counts(self, tokens: TokenBatch) -> dict[str, Int[Tensor, ""]]:
        """Count cells that have an anchor."""
        return {"anchor": torch.isfinite(self._of(tokens)[:, 0]).sum()}

    def _of(self, tokens: TokenBatch) -> Float[Tensor, "cell component"]:
        if "row" not in tokens.labels or not len(self.anchors):
            msg = "the anchor objective needs labels['row'], and places for the rows: Anchor.place"
            raise ValueError(msg)
        return self.anchors[tokens.labels["row"]]
