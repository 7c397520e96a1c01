"""What pages say of models and versions, in words."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch

from annformer.scgpt import ScGPT, locate

INTEGRATION_PACKAGES: Final = (
    *("annformer", "torch", "scanpy", "scikit-misc", "anndata", "numpy", "scipy", "scikit-learn", "umap-learn", "igraph", "scib-metrics"),
    *("harmonypy", "scvi-tools"),
)
"""Versions of what an integration, its floors, its scores and its maps follow."""


def card_text(source: str | Path) -> str:
    """Text of the model card, "" where the model has none."""
    card = locate(source) / "README.md"
    return card.read_text(encoding="utf-8") if card.is_file() else ""


def card_says(card: str) -> str:
    """First paragraph of a model card, below its title."""
    paragraphs = [" ".join(part.split()) for part in card.split("\n\n")]
    return next((part.replace("**", "") for part in paragraphs if part and not part.startswith("#")), "")


def model_facts(model: ScGPT, card: str) -> dict[str, object]:
    """Sizes and origin of a model; `card` is the text of its model card."""
    sizes, made = model.config.model, model.config.provenance
    told = {"made by": "made_by", "cells": "cells", "steps": "steps", "held-out error (bins²)": "held_out_squared_error"}
    return {
        "name": model.name,
        "network": f"{sizes.n_layers} layers, {sizes.width} wide, {sizes.n_heads} heads",
        "vocabulary": f"{len(model.vocab.genes):,} genes, {len(model.vocab.untrained):,} of them not learned and not read",
        "tokens per cell": f"at most {model.tokenizer.max_length:,}",
        **{name: as_words(made[key]) for name, key in told.items() if key in made},
        "full card": "README.md in the folder of the model" if card else "none",
        "fingerprint": model.fingerprint,
    }


def as_words(value: object) -> str:
    """Nested settings as one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {as_words(inner)}" for name, inner in value.items())
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}" if isinstance(value, float) else str(value)


def version_facts(packages: Iterable[str], **more: object) -> dict[str, object]:
    """Machine and versions of those `packages` that are installed, after what else there is to say."""
    facts, n = dict(more), torch.get_num_threads()
    facts["machine"] = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {n} thread{'s' * (n > 1)}"
    return facts | installed(packages)


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those `packages` that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
