"""The network as a part of a classifier: its cell embedding as it is, or fine-tuned with a head of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from annformer.data.anndata import AnnDataSource
from annformer.data.source import CellSource
from annformer.errors import input_error
from annformer.inference import encode_cells
from annformer.model.lowrank import add_low_rank, merge_low_rank
from annformer.objectives.cls import CLS
from annformer.scgpt import ModelFolderConfig, ScGPT
from annformer.tasks._annotation_cells import TYPE, Reference, learnable
from annformer.tasks._annotation_recipe import AnnotationRecipe
from annformer.tasks._cells import chosen_genes, digest, expression_over
from annformer.tasks._classifier import NetworkPart, Said
from annformer.tasks._encoding import device_named, embeddings
from annformer.tasks._finetune import grown, trained
from annformer.tasks._given import Cells, Chosen, given_embedding
from annformer.tasks._linear_part import Linear, fit_linear
from annformer.tokenizer import TokenizerSettings
from annformer.train.datamodule import CellDataModule

HEAD = "cls"


class Made(NamedTuple):
    """By what an embedding is made, so that one that is at hand can be told from another."""

    model: str
    fingerprint: str
    tokenizer: TokenizerSettings


def untouched(base: ScGPT, *, pretrained: bool, seed: int, device: str | None) -> ScGPT:
    """The network as it is, or one like it with random weights, as a model of its own."""
    place = device_named(device or "cpu")
    if not pretrained:
        return grown(base, base.config, base.vocab, pretrained=False, seed=seed).to(place).eval()
    return copy.deepcopy(base).to(place).eval()


def network_part(
    base: ScGPT,
    reference: Reference,
    cells: Cells,
    recipe: AnnotationRecipe,
    *,
    pretrained: bool,
    seed: int,
    folder: str | Path | None,
    device: str | None,
    threads: int | None,
) -> tuple[ScGPT, NetworkPart | None, pd.DataFrame]:
    """Do with the network what the recipe says.

    Returns
    -------
    The network; what it says of the reference, None where it takes no part; the losses of a tuned one.
    """
    if recipe.tuning == "none":
        return cells.model, None, pd.DataFrame()
    if recipe.tuning == "frozen":
        return cells.model, frozen_part(reference, embedded(cells, reference.rows), recipe.strengths, recipe.balance), pd.DataFrame()
    model = begun(base, reference, recipe, pretrained=pretrained, seed=seed)
    job = {"model": base.fingerprint, "pretrained": pretrained, "recipe": recipe.model_dump(mode="json"), "seed": seed}
    return model, *tuned_part(model, reference, cells.source, recipe, seed=seed, folder=folder, job=job, device=device, threads=threads)


def require_read(embedding: str | None, *, reads: bool) -> None:
    """Refuse an embedding that would not be read."""
    if embedding is not None and not reads:
        found = f"an embedding, {embedding!r}, for a classifier that reads none: its network is tuned, or left out"
        raise input_error(found, "a network that is used as it is (tuning: frozen)", "leave embedding (--embedding) out")


def embedded(cells: Cells, rows: Int[np.ndarray, "cell"] | None = None) -> Float[np.ndarray, "cell width"]:
    """Embeddings of length 1, as `embed` writes them, of all cells, or of those in `rows`; NaN where no gene is expressed."""
    if cells.embedding is not None:
        given = given_embedding(cells.data, cells.embedding, Made(cells.model.name, cells.model.fingerprint, cells.model.tokenizer))
        return given if rows is None else given[rows]
    source = cells.source if rows is None else Chosen(cells.source, rows)
    return np.concatenate(list(embeddings(cells.model, source, cells.model.tokenizer, progress=cells.progress)))


def frozen_part(reference: Reference, states: Float[np.ndarray, "cell width"], strengths: Sequence[float], balance: float) -> NetworkPart:
    """Fit a linear map from the embedding of the network as it is."""
    states = np.nan_to_num(states)
    fitted = fit_linear(
        states,
        reference.codes,
        len(reference.types),
        reference.folds,
        strengths=strengths,
        balance=balance,
        strata=reference.strata,
    )
    return NetworkPart(fitted.out_of_fold, np.arange(len(states)), fitted.out_of_stratum, fitted.linear, states)


def begun(base: ScGPT, reference: Reference, recipe: AnnotationRecipe, *, pretrained: bool, seed: int) -> ScGPT:
    """Make the network before its first step: it reads highly variable genes, and has a head for the types."""
    panel, how = chosen_genes(reference.cells, np.zeros(len(reference.codes), np.int64), recipe.n_genes)
    own, model = base.tokenizer, base.config.model
    sizes = np.bincount(reference.codes, minlength=len(reference.types))
    weights = np.maximum(sizes, 1.0) ** -recipe.balance
    weights /= np.average(weights, weights=sizes)
    head = {
        "kind": "cls",
        "n_classes": len(reference.types),
        "n_layers": recipe.n_layers,
        "class_weights": weights.tolist() if recipe.balance else (),
    }
    network = model.with_(
        view=len(panel) if recipe.view else 0,
        profile=model.profile and recipe.profile,
        dropout=model.dropout if recipe.dropout is None else recipe.dropout,
        attention_dropout=model.attention_dropout if recipe.attention_dropout is None else recipe.attention_dropout,
    )
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
    folder: str | Path | None,
    job: Mapping[str, Any],
    device: str | None,
    threads: int | None,
) -> tuple[NetworkPart, pd.DataFrame]:
    """Fine-tune in place on all folds but one, which says when to stop and what the network is worth.

    It is the first that can say anything: whose types have cells in other folds.

    Parameters
    ----------
    folder
        Keeps the checkpoints.
    job
        What must be the same, beside the cells, for a run to go on.
    """
    told = learnable(reference.codes, reference.folds)
    held_back = np.flatnonzero(told & (reference.folds == reference.folds[told].min()))
    data = CellDataModule(
        reference.cells,
        model.vocab,
        model.tokenizer,
        recipe.train.with_(seed=seed, hold_out={"n_cells": len(held_back)}),
        label_keys={"cell_type": TYPE},
        panel=model.panel,
        view=recipe.view,
        profile=model.config.model.profile,
        held_out=held_back,
    )
    if recipe.tuning == "low-rank":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_low_rank(model.encoder, recipe.rank)
    history = trained(
        model, data, folder=None if folder is None else Path(folder), job=_job(job, reference), device=device, threads=threads
    )
    if recipe.tuning == "low-rank":
        merge_low_rank(model.encoder)
    model.eval()
    states = states_of(model, Chosen(source, reference.rows))
    return NetworkPart(head_logits(model, states[held_back]), held_back, None, None, states), history


def _job(job: Mapping[str, Any], reference: Reference) -> dict[str, Any]:
    return {**job, "cells": digest(reference.cells, np.stack((reference.codes, reference.folds)))}


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


def network_says(cells: Cells, head: Linear | None) -> Said:
    """Logits of the network's part, by its own head or by one on its embedding, and the states that the head reads."""
    if head is None:
        states = states_of(cells.model, cells.source)
        return Said(head_logits(cells.model, states), states)
    states = np.nan_to_num(embedded(cells))
    return Said(head.logits(states), states)
