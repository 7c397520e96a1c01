"""The objectives: one loss with its own head per file, and the table that names them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from annformer.model.config import ModelConfig
from annformer.objectives.affine import Affine, AffineConfig
from annformer.objectives.anchor import Anchor, AnchorConfig
from annformer.objectives.cce import CCE, CCEConfig
from annformer.objectives.cls import CLS, CLSConfig
from annformer.objectives.dar import DAR, DARConfig
from annformer.objectives.ecs import ECS, ECSConfig
from annformer.objectives.gep import GEP, GEPConfig
from annformer.objectives.gepc import GEPC, GEPCConfig
from annformer.objectives.protocol import Encode, Loss, Objective, ObjectiveConfig, Prediction

OBJECTIVES: dict[str, type[Objective]] = {
    "affine": Affine,
    "anchor": Anchor,
    "cce": CCE,
    "cls": CLS,
    "dar": DAR,
    "ecs": ECS,
    "gep": GEP,
    "gepc": GEPC,
}
"""Kind -> objective. A new one is a file and a row here, and its config in `AnyObjectiveConfig`."""

AnyObjectiveConfig = Annotated[
    AffineConfig | AnchorConfig | CCEConfig | CLSConfig | DARConfig | ECSConfig | GEPConfig | GEPCConfig,
    Field(discriminator="kind"),
]


def each_kind_once(objectives: dict[str, AnyObjectiveConfig]) -> dict[str, AnyObjectiveConfig]:
    """Refuse two objectives of one kind: their losses would be told apart by nothing."""
    kinds = [config.kind for config in objectives.values()]
    if doubles := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        msg = f"more than one objective of the kind {', '.join(doubles)}: keep one of each"
        raise ValueError(msg)
    return objectives


def build(config: AnyObjectiveConfig, model: ModelConfig) -> Objective:
    """Build the objective that `config.kind` names, with its head sized for `model`."""
    return OBJECTIVES[config.kind](config, model)


__all__ = ["OBJECTIVES", "AnyObjectiveConfig", "Encode", "Loss", "Objective", "ObjectiveConfig", "Prediction", "build", "each_kind_once"]
