"""AnnotationRecipe: every choice of a cell type classifier."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

import annformer
from annformer.config import Config
from annformer.tasks._recipe import Recipe
from annformer.train.config import TrainConfig

TASK = "annotation"
Positive = Annotated[float, Field(gt=0)]


class AnnotationRecipe(Recipe):
    """Settings of a `CellTypeClassifier`. What is not said is as in the recipe `annotate`, inside `train` too."""

    shipped = ("annotate", "annotate-original")

    tuning: Literal["frozen", "full", "low-rank", "none"]
    """What happens to the network: its cell embedding is read as it is; all its weights are fine-tuned; only matrices of low rank beside
    its weights, and the head; or it takes no part."""
    rank: int = Field(gt=0)
    """Of the matrices of `low-rank`."""
    depths: tuple[Positive, ...]
    """Counts to which cells are scaled before the logarithm, in units of the median cell: a linear part for each; none: no linear part."""
    strengths: tuple[Positive, ...] = Field(min_length=1)
    """Inverse penalties of the linear parts, ascending; each part takes what suits cells that it has not learned from."""
    scaled_genes: int = Field(ge=0)
    """Highly variable genes that one more linear part reads, each scaled to variance 1, all types as frequent as each other; 0: none."""
    scaled_strengths: tuple[Positive, ...] = Field(min_length=1)
    """Its inverse penalties, ascending."""
    balance: float = Field(ge=0, le=1)
    """A type of n cells counts as n^(1 - balance) in what is minimised."""
    n_folds: int = Field(ge=2)
    """Every cell is held back once, in one of so many folds; the network, when it is tuned, holds back one only."""
    most_cells: int = Field(gt=1)
    """Where a reference has more cells and more genes than this, so many cells are drawn; rare types are kept."""
    n_genes: int = Field(gt=0)
    """Highly variable genes that the tuned network reads; the linear parts read all."""
    zeros: Annotated[float, Field(ge=0)] | Literal["all"]
    max_length: int = Field(ge=2)
    """Most tokens of a cell that the tuned network reads; a frozen one reads as many as it did."""
    cls_value: float | None
    """Value at `<cls>`; None: the one that the model knows."""
    view: bool
    """Let the tuned cell embedding read log-normalised expression beside the tokens."""
    profile: bool
    """False: the tuned network goes without the profile of the model that it begins with, if that has one."""
    dropout: float | None = Field(ge=0, lt=1)
    """None: that of the model."""
    attention_dropout: float | None = Field(ge=0, lt=1)
    """None: that of the model."""
    n_layers: int = Field(gt=0)
    """Linear layers of the network's head."""
    train: TrainConfig

    @property
    def tunes(self) -> bool:
        """Whether the network is fine-tuned."""
        return self.tuning in ("full", "low-rank")

    def linear_parts(self) -> dict[str, Any]:
        """What the linear parts need to know."""
        names = ("depths", "strengths", "balance", "scaled_genes", "scaled_strengths")
        return {name: getattr(self, name) for name in names}

    @model_validator(mode="after")
    def _has_a_part(self) -> Self:
        if self.tuning == "none" and not (self.depths or self.scaled_genes):
            msg = "tuning none without depths and scaled_genes leaves nothing that could tell types apart"
            raise ValueError(msg)
        return self


class Options(Config):
    """What a `CellTypeClassifier` was told."""

    label_key: str
    batch_key: str | None
    layer: str | None
    gene_key: str | None
    seed: int


class Learned(Config):
    """What the folder of a classifier says of it."""

    types: tuple[str, ...]
    n_cells: tuple[int, ...]
    held_back: dict[str, float]
    options: Options

    def provenance(self, recipe: AnnotationRecipe, *, base: str, pretrained: bool) -> dict[str, Any]:
        """How the classifier came about; `base` names the network that it began with."""
        verb = {"full": "fine-tuned", "low-rank": "fine-tuned (low rank)"}.get(recipe.tuning, "used as it is")
        return {
            "name": f"{base}, annotating {self.options.label_key}",
            "task": TASK,
            "made_by": f"annformer {annformer.__version__}, {base if pretrained else 'random weights'} {verb}",
            "recipe": recipe.model_dump(mode="json"),
            "classifier": self.model_dump(mode="json"),
        }
