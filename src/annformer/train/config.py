"""Settings of a training run: what a recipe says."""

from __future__ import annotations

from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator

from annformer.config import Config
from annformer.errors import input_error
from annformer.model.config import ModelConfig
from annformer.objectives import AnyObjectiveConfig
from annformer.objectives.gep import GEPConfig
from annformer.objectives.gepc import GEPCConfig
from annformer.tokenizer import TokenizerSettings
from annformer.vocab import GeneVocab


class TrainConfig(Config):
    """How long, how fast and on which cells the weights are fitted."""

    epochs: int = Field(20, gt=0)
    """Times that every training cell is seen."""
    cells_per_step: int = Field(16, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    """Highest rate: reached after the warm-up, left along half a cosine."""
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises from 0."""
    last_rate_share: float = Field(0.05, ge=0, le=1)
    """Rate of the last step as a share of the highest."""
    weight_decay: float = Field(0.01, ge=0)
    """Of AdamW, on matrices only."""
    clip_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this length."""
    asked_shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field((0.25, 0.5, 0.75), min_length=1)
    """Shares of a cell's genes that are asked; each step draws one of them."""
    validation_share: float = Field(0.1, gt=0, lt=1)
    """Share of the cells that are never trained on and measure the error."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Decides weights, splits, order, ties, questions and dropout."""


def _generative() -> dict[str, AnyObjectiveConfig]:
    return {"gep": GEPConfig.model_validate({"cell_prompt": True}), "gepc": GEPCConfig.model_validate({})}


class PretrainConfig(Config):
    """Everything that decides a pretraining run beside its cells: the recipe."""

    model: dict[str, Any] = Field(default_factory=dict)
    """Fields of ModelConfig; `vocab_size` follows from the vocabulary."""
    tokenizer: TokenizerSettings = Field(default_factory=TokenizerSettings)
    objectives: dict[str, AnyObjectiveConfig] = Field(default_factory=_generative, min_length=1)
    """By default the published ones: GEP with its second pass from the cell embedding, and GEPC."""
    train: TrainConfig = Field(default_factory=TrainConfig)

    @field_validator("model")
    @classmethod
    def _is_a_network(cls, value: dict[str, Any]) -> dict[str, Any]:
        ModelConfig.model_validate({"vocab_size": 1} | value)
        return value

    @classmethod
    def from_yaml(cls, text: str, *, where: str) -> PretrainConfig:
        """Read a recipe; `where` it came from stands in error messages."""
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            found = f"{where} is not YAML: {' '.join(str(error).split())}"
            raise input_error(found, "a recipe as in recipes/", "correct the line that is named") from None
        return cls.read(values or {}, where=where)

    def network(self, vocab: GeneVocab) -> ModelConfig:
        """Sizes of the network over `vocab`."""
        return ModelConfig.model_validate(self.model | {"vocab_size": len(vocab)})
