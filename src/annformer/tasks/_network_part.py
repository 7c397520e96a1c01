"""The network as a part of a classifier: its cell embedding as it is, or fine-tuned with a head of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from annformer.data.anndata import AnnDataSource
from annformer.data.source import CellSource
from annformer.inference import encode_cells
from annformer.model.lowrank import add_low_rank, merge_low_rank
from annformer.objectives.cls import CLS
from annformer.scgpt import ModelFolderConfig, ScGPT
from annformer.tasks._annotation_cells import TYPE, Reference
from annformer.tasks._annotation_recipe import AnnotationRecipe
from annformer.tasks._cells import chosen_genes, expression_over
from annformer.tasks._chosen import Chosen
from annformer.tasks._classifier import NetworkPart
from annformer.tasks._encoding import embeddings
from annformer.tasks._finetune import grown, trained
from annformer.tasks._linear_part import fit_linear
from annformer.tokenizer import TokenizerSettings
from annformer.train.datamodule import CellDataModule

log = logging.getLogger(__name__)

HEAD = "cls"


def embedded(model: ScGPT, source: CellSource, *, progress: bool | None) -> Float[np.ndarray, "cell width"]:
    """Cell embeddings of length 1, as `embed` writes them; NaN where no gene is expressed."""
    return np.concatenate(list(embeddings(model, source, model.tokenizer, progress=progress)))


def frozen_part(reference: Reference, states: Float[np.ndarray, "cell width"], strengths: Sequence[float], balance: float) -> NetworkPart:
    """Fit a linear map from the embedding of the network as it is."""
    fitted = fit_linear(np.nan_to_num(states), reference.codes, len(reference.types), reference.folds, strengths=strengths, balance=balance)
    return NetworkPart(fitted.out_of_fold, np.arange(len(states)), fitted.linear)


def begun(base: ScGPT, reference: Reference, recipe: AnnotationRecipe, *, pretrained: bool, seed: int) -> ScGPT:
    """Make the network before its first step: it reads highly variable genes, and has a head for the types."""
    panel, how = chosen_genes(reference.cells, np.zeros(len(reference.codes), np.int64), recipe.n_genes)
    own, model = base.tokenizer, base.config.model
    weights = np.maximum(np.bincount(reference.codes), 1.0) ** -recipe.balance
    head = {
        "kind": "cls",
        "n_classes": len(reference.types),
        "n_layers": recipe.n_layers,
        "class_weights": (weights / np.average(weights, weights=np.bincount(reference.codes))).tolist() if recipe.balance else (),
    }
    network = model.with_(view=len(panel) if recipe.view else 0, dropout=model.dropout if recipe.dropout is None else recipe.dropout)
    tokens = own.with_(
        zeros=recipe.zeros, max_length=recipe.max_length, cls_value=own.cls_value if recipe.cls_value is None else recipe.cls_value
    )
    fields: dict[str, Any] = {
        "model": network.model_dump(),
        "tokenizer": tokens.model_dump(),
        "objectives": {HEAD: head},
        "panel": tuple(base.vocab.tokens[i] for i in panel),
        "provenance": {"genes_chosen_by": how},
    }
    tuned = grown(base, ModelFolderConfig.model_validate(fields), base.vocab.all_trained(), pretrained=pretrained, seed=seed)
    if tuned.encoder.view is not None:
        mean = np.asarray(expression_over(reference.cells, panel).mean(axis=0), np.float32).reshape(-1)
        tuned.encoder.view.mean.copy_(torch.from_numpy(mean))
    return tuned


def tuned_part(
    model: ScGPT,
    reference: Reference,
    source: AnnDataSource,
    recipe: AnnotationRecipe,
    *,
    seed: int,
    folder: Path | None,
    job: Mapping[str, Any],
    device: str | None,
    threads: int | None,
) -> tuple[NetworkPart, pd.DataFrame]:
    """Fine-tune in place on all folds but the first, which says when to stop and what the network is worth."""
    held_back = np.flatnonzero(reference.folds == 0)
    data = CellDataModule(
        reference.cells,
        model.vocab,
        model.tokenizer,
        recipe.train.with_(seed=seed, hold_out={"n_cells": len(held_back)}),
        label_keys={"cell_type": TYPE},
        panel=model.panel,
        view=recipe.view,
        held_out=held_back,
    )
    if recipe.tuning == "low-rank":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_low_rank(model.encoder, recipe.rank)
    history = trained(model, data, folder=folder, job=job, device=device, threads=threads)
    if recipe.tuning == "low-rank":
        merge_low_rank(model.encoder)
    model.eval()
    logits = head_logits(model, states_of(model, Chosen(source, reference.rows[held_back])))
    return NetworkPart(logits, held_back, None), history


def states_of(model: ScGPT, source: CellSource) -> Float[np.ndarray, "cell width"]:
    """Cell states of a tuned network."""
    return np.concatenate([states for _, states in encode_cells(model, source)])


def head_logits(model: ScGPT, states: Float[np.ndarray, "cell width"]) -> Float[np.ndarray, "cell type"]:
    """What the head says of cell states."""
    head = model.objectives[HEAD]
    assert isinstance(head, CLS)
    with torch.inference_mode():
        weight = head.out.weight
        return head.of_cells(torch.from_numpy(states).to(weight)).double().cpu().numpy()


class Made(NamedTuple):
    """By what the embedding of a frozen network is made, so that one that is at hand can be told from another."""

    model: str
    fingerprint: str
    tokenizer: TokenizerSettings

    @classmethod
    def by(cls, model: ScGPT) -> Self:
        """Describe what `embedded` makes."""
        return cls(model.name, model.fingerprint, model.tokenizer)
