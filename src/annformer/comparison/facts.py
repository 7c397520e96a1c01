"""What pages say of models and versions, in words."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
import yaml

from annformer.data.anndata import AnnDataSource
from annformer.genes import match_genes
from annformer.scgpt import ScGPT, locate

INTEGRATION_PACKAGES: Final = (
    *("annformer", "torch", "scanpy", "scikit-misc", "anndata", "numpy", "scipy", "scikit-learn", "umap-learn", "igraph", "scib-metrics"),
    *("harmonypy", "scvi-tools"),
)
"""Versions of what an integration, its floors, its scores and its maps follow."""
RECIPE_TITLE: Final = "Settings by which it learned here: the recipe as used"


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
        "vocabulary": f"{len(model.vocab.genes):,} genes, {_read_of(model)}",
        "tokens per cell": f"at most {model.tokenizer.max_length:,}",
        **{name: as_words(made[key]) for name, key in told.items() if key in made},
        **({"full card": "README.md in the folder of the model"} if card else {}),
        "fingerprint": model.fingerprint,
    }


def _read_of(model: ScGPT) -> str:
    """Which genes of its vocabulary a model reads."""
    if model.panel is not None:
        return f"of which it was fine-tuned on {len(model.panel):,}"
    return f"{len(model.vocab.untrained):,} of them not learned and not read"


def gene_lines(source: AnnDataSource, base: ScGPT, *, tuned: bool = True) -> list[str]:
    """Say which genes of the cells are known: to `base`, or, where it is fine-tuned, to what comes of it, which learns all of its genes."""
    before = match_genes(source.gene_names, base.vocab).report()
    if not tuned:
        return before.lines(base.name)
    lines = match_genes(source.gene_names, base.vocab.all_trained()).report().lines("the fine-tuned model")
    if n := before.n_untrained:
        some = ", ".join(before.untrained[:5]) + (", ..." if n > 5 else "")
        lines.append(f"{base.name} has not learned {n:,} of the genes ({some}): it leaves them out until fine-tuning has taught it")
    return lines


def as_words(value: object) -> str:
    """Nested settings as one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {as_words(inner)}" for name, inner in value.items())
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}" if isinstance(value, float) else str(value)


def as_yaml(recipe: Mapping[str, Any]) -> str:
    """Settings of a recipe as a file that `--recipe` reads, but for its seed: the estimator has its own."""
    said = dict(recipe) | {"train": {name: value for name, value in recipe["train"].items() if name != "seed"}}
    return yaml.safe_dump(said, sort_keys=False, default_flow_style=None, width=100)


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
