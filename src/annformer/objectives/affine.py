"""Affine expression prediction for perturbations: coefficient times the control's expression plus bias."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
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
    take,
)
from annformer.tokens import Encoded, TokenBatch


class AffineConfig(ObjectiveConfig):
    """Settings of the perturbation objective."""

    kind: Literal["affine"] = "affine"
    activation: Literal["relu"] | None = None
    """Applied to coefficient and bias."""
    adaptive_bias: bool = False
    """Multiply the bias by the mean of the cell's non-zero inputs."""
    zero_probability: bool = False


class Affine(Objective):
    """Perturbed expression = coefficient x control expression + bias, both read from the gene's state (scGPT `AffineExprDecoder`)."""

    config_class = AffineConfig

    def __init__(self, config: AffineConfig, model: ModelConfig) -> None:
        super().__init__(config, model)
        self.config = config
        self.coefficient = expression_head(model.head_width, model.width)
        self.bias = expression_head(model.head_width, model.width)
        self.coefficient_nonzero = expression_head(model.head_width, model.width) if config.zero_probability else None
        # the original trains a second head beside the bias and never reads it; it is kept so that its checkpoints load whole
        self.bias_nonzero = expression_head(model.head_width, model.width) if config.zero_probability else None

    def predict(self, encoded: Encoded, tokens: TokenBatch) -> Prediction:
        """Predicted expression after the perturbation at every encoded row."""
        x = state_and_context(encoded)
        coefficient, bias = self.coefficient(x).squeeze(-1), self.bias(x).squeeze(-1)
        if self.config.activation == "relu":
            coefficient, bias = coefficient.relu(), bias.relu()
        if self.config.adaptive_bias:
            bias = bias * take(self._mean_input(tokens)[tokens.cell_of_token()], encoded.rows)
        value = coefficient * take(tokens.values, encoded.rows) + bias
        return Prediction(value, None if self.coefficient_nonzero is None else self.coefficient_nonzero(x).squeeze(-1))

    @staticmethod
    def _mean_input(tokens: TokenBatch) -> Float[Tensor, "cell"]:
        """Mean of the expressed inputs per cell; `<cls>` never has a positive value, so it does not count."""
        expressed = (tokens.values > 0).to(tokens.values)
        zero = tokens.values.new_zeros(tokens.n_cells)
        of = tokens.cell_of_token()
        return zero.index_add(0, of, tokens.values * expressed) / zero.index_add(0, of, expressed).clamp(min=1)

    def losses(self, encoded: Encoded, tokens: TokenBatch, encode: Encode) -> dict[str, Loss]:  # noqa: ARG002
        """`affine`, `affine_nonzero`."""
        return expression_losses(self.predict(encoded, tokens), encoded, tokens, "affine")

    def counts(self, tokens: TokenBatch) -> dict[str, Int[Tensor, ""]]:
        """Count asked genes."""
        return expression_counts(tokens, "affine", zero_probability=self.config.zero_probability)
