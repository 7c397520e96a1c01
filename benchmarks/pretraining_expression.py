"""How well asked genes are predicted in cells of unseen studies: the model beside the gene's mean and a ridge (part of pretraining.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData

import annformer as af
from annformer.baselines import VisibleGeneRidge, gene_means
from annformer.objectives.gep import GEP
from annformer.objectives.gepc import GEPC
from annformer.tokenizer import tokenize
from annformer.tokens import CellBatch, TokenBatch
from pretraining_cells import (
    Corpus,
    asked_batches,
    interval,
    means_over,
    read_cells,
    resampled_mean,
    split_matrices,
    verdict,
    whole,
)

SHARES = (0.25, 0.5, 0.75)
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)
SMOOTHINGS = (0.0, 3.0, 10.0, 30.0, 100.0)
RANKS = (64, 128, 256)
CELLS_PER_FORWARD = 8
N_DRAWS = 1_000
FLOORS = ("gene mean", "ridge")


class Floors:
    """The gene's mean and one ridge per asked share, fitted on the corpus; smoothing, rank and strength chosen on its held-out studies.

    Smoothing and rank are those of the first share. After the choice both floors are fitted once more on all cells of the corpus.
    """

    def __init__(self, corpus: Corpus, *, ranks: Sequence[int], seed: int) -> None:
        self.ridges: dict[float, VisibleGeneRidge] = {}
        self.chosen: dict[str, float] = {}
        self.by_rank: dict[int, float] = {}
        for share in SHARES:
            few, held = (_matrices(corpus, rows, share, seed) for rows in (corpus.chosen_from, corpus.held_out))
            if not self.chosen:
                self.chosen["smoothing"] = min(SMOOTHINGS, key=partial(_mean_error, few, held))
            ridge = partial(VisibleGeneRidge, smoothing=self.chosen["smoothing"], seed=seed)
            best = ridge(ranks=ranks, strengths=STRENGTHS).fit(*few, held_out=held)
            self.chosen |= {"rank": best.rank_, f"strength at {share:g}": best.strength_}
            self.by_rank = self.by_rank or {of: min(best.errors_[of, strength] for strength in STRENGTHS) for of in ranks}
            ranks = (best.rank_,)
            del few
            self.ridges[share] = ridge(ranks=ranks, strengths=(best.strength_,)).fit(*_matrices(corpus, corpus.rows, share, seed))

    def predict(self, tokens: TokenBatch, share: float, n_genes: int) -> dict[str, np.ndarray]:
        """Values at the asked tokens, in their order."""
        visible, asked = split_matrices(tokens, n_genes)
        cells, genes = np.repeat(np.arange(tokens.n_cells), np.diff(asked.indptr)), asked.indices
        ridge = self.ridges[share]
        return {"gene mean": ridge.means_[genes], "ridge": ridge.predict(visible, cells, genes)}


def _matrices(corpus: Corpus, rows: np.ndarray, share: float, seed: int) -> tuple[sp.csr_array, sp.csr_array]:
    n_genes = len(corpus.model.vocab)
    parts = [
        split_matrices(tokens, n_genes)
        for cells in corpus.batches(rows)
        for _, tokens in asked_batches(corpus.model, cells, [share], seed=seed)
    ]
    return tuple(sp.csr_array(sp.vstack(matrices, format="csr")) for matrices in zip(*parts, strict=True))


def _mean_error(few: tuple[sp.csr_array, sp.csr_array], held: tuple[sp.csr_array, sp.csr_array], smoothing: float) -> float:
    ids, values = (np.concatenate([getattr(matrix, name) for matrix in few]) for name in ("indices", "data"))
    means = gene_means(ids, values, few[0].shape[1], smoothing=smoothing)
    return float(np.mean((held[1].data - means[held[1].indices]) ** 2))


def model_predictions(model: af.ScGPT, tokens: TokenBatch) -> dict[str, np.ndarray]:
    """What each objective of the model that predicts expression says at the asked tokens, in their order."""
    said: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        encoded = model.encode(tokens, "targets")
        asked = torch.isfinite(tokens.targets)[encoded.rows]
        for objective in model.objectives.values():
            if isinstance(objective, GEP):
                said["GEP"] = objective.predict(encoded).value[asked].numpy()
            elif isinstance(objective, GEPC):
                said["GEPC"] = objective.predict(encoded, tokens).value[asked].numpy()
    return said


def cell_errors(model: af.ScGPT, floors: Floors, adata: AnnData, *, seed: int) -> pd.DataFrame:
    """Sums of squared errors, a row per cell and share; `ties` is what the draw of bins between equal counts leaves to nobody."""
    cells = whole(adata, model)
    rows = []
    for first in range(0, adata.n_obs, CELLS_PER_FORWARD):
        some = cells._replace(counts=cells.counts[first : first + CELLS_PER_FORWARD])
        noise = tie_noise(model, some)
        for share, tokens in asked_batches(model, some, SHARES, seed=seed):
            truth = tokens.targets[torch.isfinite(tokens.targets)].numpy()
            n = (tokens.offsets.diff() - tokens.n_visible).numpy()
            of = np.repeat(np.arange(tokens.n_cells), n)
            said = floors.predict(tokens, share, len(model.vocab)) | model_predictions(model, tokens)
            sums = {name: np.bincount(of, (values - truth) ** 2, tokens.n_cells) for name, values in said.items()}
            rows.append(pd.DataFrame({"cell": first + np.arange(tokens.n_cells), "share": share, "n": n, **sums, "ties": noise * n}))
    table = pd.concat(rows, ignore_index=True)
    return table[table["n"] > 0]


def tie_noise(model: af.ScGPT, cells: CellBatch) -> np.ndarray:
    """Mean variance of the bins among the genes of a cell with the same count."""
    binned = tokenize(cells, model.tokenizer, cls_id=model.vocab.cls_id)
    raw = tokenize(cells, model.tokenizer.with_(values="raw"), cls_id=model.vocab.cls_id)
    assert torch.equal(binned.gene_ids, raw.gene_ids)
    table = pd.DataFrame({"cell": binned.cell_of_token(), "count": raw.values, "bin": binned.values}).drop(binned.offsets[:-1].numpy())
    of = table.groupby(["cell", "count"])["bin"]
    table["noise"] = (table["bin"] - of.transform("mean")) ** 2 * (size := of.transform("size")) / (size - 1).clip(lower=1)
    return table.groupby("cell")["noise"].mean().reindex(range(binned.n_cells), fill_value=0.0).to_numpy()


def ratio_draws(errors: pd.DataFrame, method: str, floor: str, *, seed: int) -> np.ndarray:
    """Bootstrap draws over cells of the error of `method` as a share of that of `floor`."""
    sums = errors.groupby("cell")[[method, floor]].sum().to_numpy()
    weights = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=N_DRAWS)
    drawn = weights @ sums
    return drawn[:, 0] / drawn[:, 1]


def summary(errors: Mapping[str, pd.DataFrame], *, seed: int) -> pd.DataFrame:
    """Errors of every set, and the ratios of the model's to the floors' with their intervals; the last rows are means over sets."""
    methods = [name for name in ("gene mean", "ridge", "GEP", "GEPC", "ties") if name in next(iter(errors.values()))]
    each = {name: table[methods].sum() / table["n"].sum() for name, table in errors.items()}
    rows = [{"set": name, "cells": table["cell"].nunique(), **each[name]} for name, table in errors.items()]
    means = means_over(errors)
    for title, names in means.items():
        rows.append({"set": title, "cells": sum(errors[name]["cell"].nunique() for name in names), **pd.DataFrame(each)[names].T.mean()})
    for method in ("GEP", "GEPC"):
        for floor in FLOORS if method in methods else ():
            draws = {name: ratio_draws(table, method, floor, seed=seed) for name, table in errors.items()}
            ratios = {name: each[name][method] / each[name][floor] for name in errors}
            found = [*ratios.values(), *(float(np.mean([ratios[name] for name in names])) for names in means.values())]
            of_means = [resampled_mean({name: draws[name] for name in names}, seed=seed) for names in means.values()]
            for row, ratio, drawn in zip(rows, found, [*draws.values(), *of_means], strict=True):
                low, high = interval(drawn)
                row[f"{method} / {floor}"] = f"{ratio:.3f} ({low:.3f} to {high:.3f}) {verdict(low, high, even=1, less_is_better=True)}"
    return pd.DataFrame(rows)


def by_share(errors: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean over the sets of the error at each asked share."""
    tables = [table.groupby("share").sum().pipe(lambda sums: sums.div(sums["n"], axis=0)) for table in errors.values()]
    mean = sum(tables) / len(tables)
    mean["GEP / gene mean"] = mean["GEP"] / mean["gene mean"]
    mean["GEP / ridge"] = mean["GEP"] / mean["ridge"]
    return mean.drop(columns=["cell", "n"]).reset_index()


def tables(
    model: af.ScGPT, corpus: Corpus, sets: Mapping[str, Path], *, n_cells: int, ranks: Sequence[int], seed: int
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Tables by name, and what to say under them."""
    floors = Floors(corpus, ranks=ranks, seed=seed)
    errors = {
        name: cell_errors(model, floors, read_cells(path, n_cells, seed=seed, labelled=False), seed=seed) for name, path in sets.items()
    }
    chosen = ", ".join(f"{name} {value:g}" for name, value in floors.chosen.items())
    by_rank = ", ".join(f"{rank}: {error:.2f}" for rank, error in floors.by_rank.items())
    notes = [
        f"Squared error in bins at the asked genes of at most {n_cells} cells a set, asked shares {SHARES} together.",
        f"Ridge: one per share, fitted on {len(corpus.rows):,} cells of the corpus with as many genes hidden; chosen on held-out studies of"
        f" the corpus: {chosen} (their error at share {SHARES[0]:g} by rank: {by_rank}).",
        "Ties: what no method can predict, because equal counts are drawn into different bins. Intervals: 95 %, bootstrap over the cells of"
        " a set; of the mean, over sources and cells.",
    ]
    each = pd.concat([table.assign(set=name) for name, table in errors.items()], ignore_index=True)
    return {"expression": summary(errors, seed=seed), "expression_by_share": by_share(errors), "expression_cells": each}, notes
