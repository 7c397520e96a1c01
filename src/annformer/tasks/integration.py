"""BatchIntegrator: one embedding for cells of several batches, and their expression without what the batches add."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from jaxtyping import Float, Int
from safetensors.numpy import load_file

import annformer
from annformer import checkpoints
from annformer.config import Config
from annformer.data.anndata import AnnDataSource, reading_quietly
from annformer.data.random_cells import MemoryCells
from annformer.errors import AnnformerWarning, input_error
from annformer.inference import encode_cells
from annformer.objectives.anchor import Anchor
from annformer.scgpt import DEFAULT_MODEL, ModelFolderConfig, ScGPT
from annformer.tasks._alignment import find_anchors
from annformer.tasks._cells import chosen_genes, digest, expression_over, n_matched, reads_sizes, require_counts, require_genes
from annformer.tasks._correction import Correction, fit_correction
from annformer.tasks._finetune import grown, loaded, made_for, require_same_job, trained
from annformer.tasks._integration_cells import require_batches, warn_empty
from annformer.tasks._integration_recipe import IntegrationRecipe
from annformer.tasks._place import check_key, check_target, put
from annformer.tasks._stopwatch import timed
from annformer.tasks._threads import torch_threads
from annformer.train.datamodule import CellDataModule
from annformer.vocab import GeneVocab

log = logging.getLogger(__name__)

TASK = "integration"


class Options(Config):
    """What a `BatchIntegrator` was told."""

    batch_key: str
    layer: str | None
    gene_key: str | None
    seed: int


class Integrated(Config):
    """What the folder of a fine-tuned model says of its integrator."""

    batches: tuple[str, ...]
    n_matched: int
    """Genes of the data that the vocabulary knows: over them the library size of a cell is counted."""
    unit_length: bool
    """The integrated embedding is brought to length 1."""
    options: Options


class BatchIntegrator:
    """Fine-tune a model on cells of several batches until its cell embedding tells types and not batches (scGPT, Methods "Integration").

    Beside GEP, GEPC and DAR, with batch embeddings beside the heads and never in the transformer, every cell embedding is drawn to an
    anchor: the mean place of the cells like it in all batches (`tasks/_alignment.py`). Nothing reads a label of cell types. With the
    expression view GEPC reconstructs what the cell embedding has read; only GEP guesses values that are hidden.

    Parameters
    ----------
    model
        What to begin with: a model, its folder or its name.
    batch_key
        Column of obs that names the batch of each cell.
    recipe
        "integrate", "integrate-original" (scGPT's settings), a YAML file, or an `IntegrationRecipe`.
    pretrained
        False: the same network with random weights, to see what pretraining is worth.
    layer, gene_key
        Where counts and gene names are, if not where `AnnDataSource` finds them.
    seed
        Decides everything that is drawn.
    device
        Such as "cuda"; None: the CPU.
    threads
        Of the CPU; None: as torch is set.

    Attributes
    ----------
    model_
        The fine-tuned model.
    batches_
        Names of the batches, in the order of their codes.
    genes_
        The genes that are read.
    match_
        How the genes of the data were found in the vocabulary (after `fit`).
    history_
        Losses by step, `train/...` and `validation/...`.
    seconds_
        What `fit` took, with its earlier starts in the same folder (after `fit`).
    """

    def __init__(
        self,
        model: ScGPT | str | Path = DEFAULT_MODEL,
        *,
        batch_key: str,
        recipe: str | Path | IntegrationRecipe = "integrate",
        pretrained: bool = True,
        layer: str | None = None,
        gene_key: str | None = None,
        seed: int = 0,
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.model, self.batch_key, self.recipe, self.pretrained = model, batch_key, recipe, pretrained
        self.layer, self.gene_key, self.seed, self.device, self.threads = layer, gene_key, seed, device, threads
        self._known: tuple[str, Float[np.ndarray, "cell width"]] | None = None
        self._correction: Correction | None = None
        self._unit_length = False

    def fit(self, adata: AnnData | str | Path, *, folder: str | Path | None = None) -> Self:
        """Fine-tune on all cells, some held back to stop in time.

        Parameters
        ----------
        adata
            Counts of cells of at least two batches.
        folder
            Keeps checkpoints, so that the same call goes on after a kill.

        Raises
        ------
        InputError
            When there is one batch only, a batch of few cells, a cell without batch, no counts, or hardly a gene that varies.
        """
        place = None if folder is None else Path(folder)
        with timed(place) as seconds:
            self._fit(adata, place)
            self.seconds_ = seconds()
        return self

    def _fit(self, adata: AnnData | str | Path, place: Path | None) -> None:
        recipe = self.recipe if isinstance(self.recipe, IntegrationRecipe) else IntegrationRecipe.named(self.recipe)
        base = loaded(self.model)
        vocab = base.vocab.all_trained()
        source = self._source(adata)
        require_counts(source)
        source.codes("batch", self.batch_key)  # before the cells are read, and under the name that the user knows
        cells = MemoryCells(source, vocab, [self.batch_key])
        codes, self.batches_ = cells.codes(self.batch_key), cells.categories(self.batch_key)
        require_batches(codes, self.batches_, self.batch_key)
        known_as = digest(cells, codes)
        asked = {"pretrained": self.pretrained, "recipe": recipe.model_dump(mode="json"), "seed": self.seed}
        job = {"model": base.fingerprint, "cells": known_as} | asked
        require_same_job(place, job)
        self.match_ = source.match(vocab)
        self._n_matched = n_matched(source, vocab)
        panel, self._how_chosen = chosen_genes(cells, codes, recipe.n_genes)
        self.genes_ = tuple(vocab.tokens[i] for i in panel)
        self._unit_length = recipe.unit_length and not recipe.anchor_weight
        self.model_ = self._begin(base, vocab, recipe)
        data = self._data(cells, recipe)
        if data.n_steps < recipe.least_steps:
            epochs = recipe.train.epochs * recipe.least_steps / data.n_steps
            data = self._data(cells, recipe.with_(train=recipe.train.with_(epochs=epochs).model_dump()))
        expression = expression_over(cells, panel)
        self._prepare(expression, codes, recipe)
        log.info(
            "fine-tuning %s on %s cells (%s held back) of %d batches, %s genes, for %d steps",
            base.name,
            *map("{:,}".format, (len(data.training_rows), len(data.validation_rows))),
            len(self.batches_),
            f"{len(panel):,}",
            data.n_steps,
        )
        self.history_ = trained(self.model_, data, folder=place, job=job, device=self.device, threads=self.threads)
        self.model_.eval()
        with torch_threads(self.threads):
            states = self._encoded(source, codes)
            self._known = known_as, states
            self._correction = None if recipe.gepc is None else fit_correction(self.model_, states, self._placed(states), codes, expression)

    def transform(self, adata: AnnData, *, key_added: str = "X_annformer", copy: bool = False) -> AnnData | None:
        """Write the integrated embedding into `obsm[key_added]` (float32): of the fitted cells, or of new ones.

        Its rows are not brought to length 1, as those of `embed` are: the length tells cells apart too. (`unit_length` of the recipe does
        it where there are no anchors, as scGPT's authors do.)

        Raises
        ------
        InputError
            When a batch was not among the fitted ones, or the genes are not there.
        """
        self._require_fitted()
        check_key(key_added)
        check_target(adata, copy=copy)
        with reading_quietly():
            embedding = self._placed(self._states(self._source(adata)))
        warn_empty(embedding)
        target = put(adata, key_added, embedding, self._record(), copy=copy)
        return target if copy else None

    def corrected(
        self, adata: AnnData, *, batch: str | Literal["mean"] = "mean", key_added: str = "annformer_corrected", copy: bool = False
    ) -> AnnData | None:
        """Write expression decoded from the cell embedding into `obsm[key_added]`, a DataFrame of cells by `genes_`, as `adata` names them.

        The GEPC head decodes each gene from what the integrated embedding tells of the cell state, with the batch context averaged over
        the batches, or that of one batch for all cells; a line per gene, fitted on the cells of `fit`, turns value bins into
        log-normalised expression. It is a model's smooth account of each cell:
        good for plots and for comparing cells across batches, not a replacement for counts in tests of differential expression.

        Parameters
        ----------
        batch
            "mean", or the name of a batch, as which all cells are shown.
        """
        self._require_fitted()
        if self._correction is None:
            found = "a recipe without gepc"
            raise input_error(found, "a model that decodes expression from cell embeddings", "fit with gepc in the recipe")
        check_key(key_added)
        check_target(adata, copy=copy)
        weights = self._batch_weights(batch)
        if "anchor" not in self.model_.objectives:
            msg = "without anchors the embedding still tells batches apart, and so does what is decoded from it"
            warnings.warn(msg, AnnformerWarning, stacklevel=2)
        with reading_quietly():
            source = self._source(adata)
            states = self._states(source)
        with torch_threads(self.threads):
            values = self._correction.decode(self.model_, self._placed(states), weights)
        table = pd.DataFrame(values, index=adata.obs_names, columns=self._own_names(source))
        target = put(adata, key_added, table, self._record() | {"shown_as": batch}, copy=copy)
        return target if copy else None

    def save(self, folder: str | Path) -> None:
        """Write the fine-tuned model, with all that `transform` and `corrected` need, as a model folder; whole or not at all."""
        self._require_fitted()
        parts = {} if self._correction is None else {checkpoints.CORRECTION: self._correction.tensors()}
        self.model_.save_pretrained(folder, parts=parts)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None, threads: int | None = None) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            When the folder holds a model of another task.
        """
        model = ScGPT.from_pretrained(folder)
        made = made_for(TASK, model, folder, "`annformer integrate` or BatchIntegrator.save")
        settings = Integrated.read(made.get("integrator"), where=f"provenance in config.json of {folder}")
        loaded_one = cls(model, device=device, threads=threads, **settings.options.model_dump())
        loaded_one.model_, loaded_one.genes_, loaded_one.batches_ = model, model.config.panel, settings.batches
        loaded_one._n_matched, loaded_one._unit_length = settings.n_matched, settings.unit_length
        path = Path(folder) / checkpoints.CORRECTION
        loaded_one._correction = Correction(**load_file(path)) if path.is_file() else None
        return loaded_one

    def _source(self, adata: AnnData | str | Path) -> AnnDataSource:
        return AnnDataSource(adata, gene_key=self.gene_key, layer=self.layer)

    def _begin(self, base: ScGPT, vocab: GeneVocab, recipe: IntegrationRecipe) -> ScGPT:
        """The network before the first step."""
        n = len(self.batches_)
        network = base.config.model.with_(
            n_batches=n,
            batch_context=True,
            input_norm="domain" if recipe.dsbn else base.config.model.input_norm,
            view=len(self.genes_) if recipe.view else 0,
            profile=base.config.model.profile and recipe.profile,
            dropout=base.config.model.dropout if recipe.dropout is None else recipe.dropout,
            attention_dropout=base.config.model.attention_dropout if recipe.attention_dropout is None else recipe.attention_dropout,
        )
        own = base.tokenizer
        tokens = own.with_(
            zeros=recipe.zeros,
            max_length=recipe.max_length,
            cls_value=own.cls_value if recipe.cls_value is None else recipe.cls_value,
        )
        options = Options(batch_key=self.batch_key, layer=self.layer, gene_key=self.gene_key, seed=self.seed)
        integrated = Integrated(batches=self.batches_, n_matched=self._n_matched, unit_length=self._unit_length, options=options)
        provenance = {
            "name": f"{base.name}, integrated by {self.batch_key}",
            "task": TASK,
            "made_by": f"annformer {annformer.__version__}, fine-tuned from {base.name if self.pretrained else 'random weights'}",
            "recipe": recipe.model_dump(mode="json"),
            "genes_chosen_by": self._how_chosen,
            "integrator": integrated.model_dump(mode="json"),
        }
        fields: dict[str, Any] = {
            "model": network.model_dump(),
            "tokenizer": tokens.model_dump(),
            "objectives": recipe.objectives(n),
            "panel": self.genes_,
            "provenance": provenance,
        }
        return grown(base, ModelFolderConfig.model_validate(fields), vocab, pretrained=self.pretrained, seed=self.seed)

    def _data(self, cells: MemoryCells, recipe: IntegrationRecipe) -> CellDataModule:
        return CellDataModule(
            cells,
            self.model_.vocab,
            self.model_.tokenizer,
            recipe.train.with_(seed=self.seed),
            label_keys={"batch": self.batch_key},
            panel=self.model_.panel,
            view=recipe.view,
            profile=self.model_.config.model.profile,
        )

    def _prepare(self, expression: sp.csr_array, codes: Int[np.ndarray, "cell"], recipe: IntegrationRecipe) -> None:
        """Tell view and anchor objective what can be known before training."""
        if self.model_.encoder.view is not None:
            self.model_.encoder.view.mean.copy_(torch.from_numpy(np.asarray(expression.mean(axis=0), np.float32).reshape(-1)))
        if "anchor" in self.model_.objectives:
            anchor = self.model_.objectives["anchor"]
            assert isinstance(anchor, Anchor)
            found = find_anchors(expression, codes, **recipe.anchor.model_dump(), seed=self.seed)
            anchor.place(torch.from_numpy(found))

    def _states(self, source: AnnDataSource) -> Float[np.ndarray, "cell width"]:
        """Cell states; those of the fitted cells are known."""
        codes = self._codes(source)
        if self._known is not None and self._known[0] == digest(MemoryCells(source, self.model_.vocab, [self.batch_key]), codes):
            return self._known[1]
        with torch_threads(self.threads):
            return self._encoded(source, codes)

    def _encoded(self, source: AnnDataSource, codes: Int[np.ndarray, "cell"]) -> Float[np.ndarray, "cell width"]:
        """Cell states, in the order of the cells."""
        require_counts(source)
        if self.device is not None:
            self.model_.to(self.device)
        source.match(self.model_.vocab)
        assert self.model_.panel is not None, "an integration chooses genes"
        require_genes(self.model_.panel, source.match(self.model_.vocab), source.name, "that the model was fitted on")
        if (n := n_matched(source, self.model_.vocab)) < 0.9 * self._n_matched and reads_sizes(self.model_):
            found = f"{source.name} has {n:,} genes that the model knows, the fitted cells had {self._n_matched:,}"
            remedy = "give all genes that were measured: a cell's expression is taken relative to their sum"
            raise input_error(found, "nearly as many", remedy)
        return np.concatenate([states for _, states in encode_cells(self.model_, source, labels={"batch": codes})])

    def _placed(self, states: Float[np.ndarray, "cell width"]) -> Float[np.ndarray, "cell component"]:
        """The integrated embedding: where the anchor objective would place the cells, or without it their states."""
        if "anchor" not in self.model_.objectives:
            lengths = np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-12) if self._unit_length else 1
            return states / lengths
        anchor = self.model_.objectives["anchor"]
        assert isinstance(anchor, Anchor)
        with torch.inference_mode():
            weight = anchor.out.weight
            return anchor.out(torch.from_numpy(states).to(weight)).float().cpu().numpy()

    def _codes(self, source: AnnDataSource) -> Int[np.ndarray, "cell"]:
        """Batches of cells as the model counts them."""
        codes = source.codes("batch", self.batch_key)
        names = source.categories["batch"]
        if unknown := [name for name in names if name not in self.batches_]:
            found = f"obs[{self.batch_key!r}] has {len(unknown)} batches that were not fitted: {', '.join(map(repr, unknown[:5]))}"
            known = ", ".join(map(repr, self.batches_[:8])) + (", ..." if len(self.batches_) > 8 else "")
            raise input_error(found, f"cells of the fitted batches: {known}", "fit again with the cells of the new batch among the others")
        return np.array([self.batches_.index(name) for name in names], np.int64)[codes]

    def _own_names(self, source: AnnDataSource) -> list[str]:
        """The genes that are read, as the data name them; by the model's names where the data lack them."""
        ids = source.match(self.model_.vocab).ids
        named = {int(gene): str(name) for gene, name in zip(ids[::-1], np.asarray(source.gene_names)[::-1], strict=True) if gene >= 0}
        return [named.get(self.model_.vocab[gene], gene) for gene in self.genes_]

    def _batch_weights(self, batch: str) -> Float[np.ndarray, "batch"]:
        if batch == "mean":
            return np.full(len(self.batches_), 1 / len(self.batches_), np.float32)
        if batch not in self.batches_:
            found = f"there is no batch {batch!r}"
            raise input_error(found, f"'mean', or one of {', '.join(map(repr, self.batches_))}", "choose one of them")
        return np.eye(len(self.batches_), dtype=np.float32)[self.batches_.index(batch)]

    def _record(self) -> dict[str, Any]:
        return {
            "model": self.model_.name,
            "fingerprint": self.model_.fingerprint,
            "task": TASK,
            "batch_key": self.batch_key,
            "batches": list(self.batches_),
            "n_genes": len(self.genes_),
            "version": annformer.__version__,
        }

    def _require_fitted(self) -> None:
        if not hasattr(self, "model_"):
            found = "a BatchIntegrator that was not fitted"
            raise input_error(found, "a fitted one", "call fit(adata) first, or BatchIntegrator.load(folder)")
