"""IntegrationRecipe: every choice of a batch integration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from annformer.config import Config
from annformer.objectives.gep import GEPConfig
from annformer.objectives.gepc import GEPCConfig
from annformer.tasks._recipe import Recipe
from annformer.train.config import TrainConfig


class AnchorSettings(Config):
    """How the places are found that cell embeddings are drawn to."""

    n_components: int = Field(gt=1)
    """Principal components of the expression of the chosen genes, and length of the integrated embedding."""
    strength: float = Field(ge=0)
    """How strongly batches are mixed inside clusters; 0: clusters form as they will."""
    n_neighbours: int = Field(gt=0)
    """Cells of each batch that a cell's place is drawn to."""
    smoothing: float = Field(ge=0, le=1)
    """Share of these neighbours in the place: more makes tighter types, and takes large ones apart."""


class IntegrationRecipe(Recipe):
    """Settings of a `BatchIntegrator`. What is not said is as in the recipe `integrate`, inside `train` and the objectives too."""

    shipped = ("integrate", "integrate-original")

    n_genes: int = Field(gt=0)
    """Highly variable genes that are read, chosen within the batches."""
    zeros: Annotated[float, Field(ge=0)] | Literal["all"]
    """Chosen genes that a cell does not express, as tokens: so many for each that it does, drawn anew in every step, or "all"."""
    max_length: int = Field(ge=2)
    """Most tokens of a cell when it is embedded; training may take fewer (`train.max_length`)."""
    cls_value: float | None
    """Value at `<cls>`; None: the one that the model knows."""
    view: bool
    """Let the cell embedding read log-normalised expression beside the tokens."""
    profile: bool
    """False: without the profile of the model that it begins with, if that has one."""
    unit_length: bool
    """Bring the integrated embedding to length 1; without anchors only: where these place a cell, its length tells too."""
    dsbn: bool
    """Normalise tokens by the statistics of their batch."""
    dropout: float | None = Field(ge=0, lt=1)
    """None: that of the model."""
    attention_dropout: float | None = Field(ge=0, lt=1)
    """None: that of the model."""
    gep: GEPConfig | None
    """None: the objective is left out, as the next ones with weight 0."""
    gepc: GEPCConfig | None
    ecs_weight: float = Field(ge=0)
    ecs_threshold: float = Field(ge=0, le=1)
    dar_weight: float = Field(ge=0)
    anchor_weight: float = Field(ge=0)
    anchor: AnchorSettings
    least_steps: int = Field(ge=0)
    """Few cells are seen more often than `train.epochs` says, until there are so many steps."""
    train: TrainConfig

    def objectives(self, n_batches: int) -> dict[str, dict[str, Any]]:
        """Settings of the objectives, for so many batches."""
        named = {"gep": self.gep, "gepc": self.gepc}
        chosen = {name: settings.model_dump() for name, settings in named.items() if settings is not None}
        if self.ecs_weight:
            chosen["ecs"] = {"kind": "ecs", "weight": self.ecs_weight, "threshold": self.ecs_threshold}
        if self.dar_weight:
            chosen["dar"] = {"kind": "dar", "weight": self.dar_weight, "n_batches": n_batches}
        if self.anchor_weight:
            chosen["anchor"] = {"kind": "anchor", "weight": self.anchor_weight, "n_components": self.anchor.n_components}
        return chosen
