"""pretrain(): cells without labels in, a model that predicts expression out."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

import annformer
from annformer.baselines import gene_means
from annformer.data.source import CellSource
from annformer.inference import evaluating
from annformer.objectives.gep import GEP
from annformer.objectives.gepc import GEPC
from annformer.scgpt import ModelFolderConfig, ScGPT
from annformer.tokens import Encoded, TokenBatch
from annformer.train.config import PretrainConfig
from annformer.train.datamodule import CellDataModule
from annformer.train.fit import fit
from annformer.train.plan import TrainingPlan
from annformer.vocab import GeneVocab

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretrained:
    """A finished pretraining run."""

    model: ScGPT
    history: pd.DataFrame
    """Losses by step, `train/...` and `validation/...`."""
    validation_rows: Int[np.ndarray, "cell"]
    """Rows of the source that were never trained on."""
    errors: dict[str, float]
    """Mean squared error (in value bins) on the held-out cells: `gep`, `gepc`, `gene mean`."""


def pretrain(source: CellSource, vocab: GeneVocab, config: PretrainConfig, folder: str | Path, *, name: str = "unnamed") -> Pretrained:
    """Train a model from scratch on the expression of cells, without any label (scGPT: generative pretraining).

    Parameters
    ----------
    source
        Cells; a share of them is held out to measure the error.
    vocab
        Tokens of the model, special ones included.
    config
        The recipe.
    folder
        Gets `log.csv`; the model itself is returned, not written.
    name
        What the model is called.
    """
    data = CellDataModule(source, vocab, config.tokenizer, config.train)
    model = new_model(vocab, config)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        "pretraining %s parameters on %d cells (%d held out) for %d steps",
        f"{n_parameters:,}",
        len(data.training_rows),
        len(data.validation_rows),
        data.n_steps,
    )
    history = fit(TrainingPlan(model, config.train, data.n_steps), data, folder)
    errors = held_out_errors(model, data)
    model.config = model.config.with_(provenance={"name": name, **_provenance(config, data, errors)})
    return Pretrained(model.eval(), history, data.cells.rows[data.validation_rows], errors)


def new_model(vocab: GeneVocab, config: PretrainConfig) -> ScGPT:
    """Build a model with random weights, the same ones for the same seed."""
    folder_config = ModelFolderConfig(model=config.network(vocab), tokenizer=config.tokenizer, objectives=config.objectives)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return ScGPT(folder_config, vocab)


def _provenance(config: PretrainConfig, data: CellDataModule, errors: dict[str, float]) -> dict[str, Any]:
    """What the model folder says about how the weights came about."""
    return {
        "made_by": f"annformer {annformer.__version__}, pretrained from scratch",
        "cells": {"trained on": len(data.training_rows), "held out": len(data.validation_rows)},
        "steps": data.n_steps,
        "training": config.train.model_dump(mode="json"),
        "held_out_squared_error": errors,
    }


def held_out_errors(model: ScGPT, data: CellDataModule) -> dict[str, float]:
    """Mean squared error, in bins, over the asked genes of held-out cells.

    By method: `gep` and `gepc` where the model has them, and the floor `gene mean`, which predicts the mean bin of each gene over the
    training cells that express it.
    """
    seen = data.training_tokens()
    means = torch.from_numpy(gene_means(seen.gene_ids.numpy(), seen.values.numpy(), len(model.vocab)))
    totals: defaultdict[str, float] = defaultdict(float)
    n_asked = 0
    with evaluating(model), torch.inference_mode():
        for tokens in data.validation_batches():
            encoded = model.encode(tokens, "targets")
            assert encoded.rows is not None and tokens.targets is not None
            target = tokens.targets[encoded.rows]
            n_asked += int(torch.isfinite(target).sum())
            for name, value in (_predictions(model, encoded, tokens) | {"gene mean": means[tokens.gene_ids[encoded.rows]]}).items():
                totals[name] += float(((value - target) ** 2).nansum())
    return {name: total / n_asked for name, total in totals.items()}


def _predictions(model: ScGPT, encoded: Encoded, tokens: TokenBatch) -> dict[str, Tensor]:
    predicted = {}
    for objective in model.objectives.values():
        if isinstance(objective, GEP):
            predicted["gep"] = objective.predict(encoded).value
        elif isinstance(objective, GEPC):
            predicted["gepc"] = objective.predict(encoded, tokens).value
    return predicted
