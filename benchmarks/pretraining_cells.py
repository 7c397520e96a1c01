"""Cells of the sets that pretraining never saw, cells of the corpus, bootstrap intervals (what the parts of pretraining.py share)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch

import annformer as af
from annformer.data.anndata import AnnDataSource
from annformer.data.store import StoreSource
from annformer.masking import ask
from annformer.tokens import CellBatch, TokenBatch

NO_LABEL = ("unlabelled", "unknown")
LABEL_KEY = "cell_type"
SETS = {
    "pbmc3k": "10x pbmc3k",
    "pbmc4k_scvi_labels": "10x pbmc4k",
    "kang_ifnb_pbmc": "Kang 2018",
    "kang_muscat_8donors": "Kang 2018",
    "zheng_sorted_mudan": "Zheng 2017",
    "zheng_facs_garnett800": "Zheng 2017",
    "zheng_sorted_safe500": "Zheng 2017",
    "blood_treg_tconv": "blood_treg_tconv",
    "lymphnode_11types": "lymphnode_11types",
    "sc_mixology_lung_cell_lines": "sc_mixology_lung_cell_lines",
    "breast_cell_lines_31": "breast_cell_lines_31",
    "headneck_tumour_chetah": "headneck_tumour_chetah",
    "pancreas_baron_cider_human": "Baron 2016",
    "pancreas_3studies": "Baron 2016",
    "brain_dlpfc_nuclei500": "brain_dlpfc_nuclei500",
}
"""Labelled sets held out from pretraining -> where their cells come from: sets of one source share cells, or a study."""
SHARED_SOURCE = "Zheng 2017"
"""The study of a set of the corpus: other cells, maybe of the same donor."""


def one_thread() -> None:
    """Let torch use one thread; to be called again after scanpy, because numba's thread pool sets the number for all of OpenMP."""
    torch.set_num_threads(1)


class Corpus(NamedTuple):
    """Cells of the pretraining store over the model's vocabulary, and which of them are held out to choose settings."""

    store: StoreSource
    model: af.ScGPT
    rows: np.ndarray
    held_out: np.ndarray
    """Of the rows: cells of whole studies, a few of each, that settings are chosen on."""
    chosen_from: np.ndarray
    """Of the rows: cells of the other studies, to fit on while settings are chosen."""

    def batches(self, rows: np.ndarray, size: int = 512) -> Iterator[CellBatch]:
        return self.store.batches(size, vocab=self.model.vocab, rows=rows)


def read_corpus(path: Path, model: af.ScGPT, *, seed: int, max_cells: int | None = None, n_held_out: int = 100) -> Corpus:
    """Every third study is held out for choices, `n_held_out` cells of each; a store of one study gives a fifth of its cells."""
    store = StoreSource(path)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(store.n_obs)[:max_cells])
    study = store.codes("study" if "study" in store.manifest.columns else "source", rows)
    names = np.unique(study)
    held = np.isin(study, names[::3]) if len(names) > 2 else rng.random(len(rows)) < 0.2
    each = [rng.permutation(rows[held & (study == name)])[:n_held_out] for name in names]
    return Corpus(store, model, rows, np.sort(np.concatenate(each)), rows[~held])


def find_sets(folder: Path, names: Sequence[str] | None) -> dict[str, Path]:
    """Files of the named sets, of all of `SETS` that are there when none is named; what is missing is an error or a line."""
    wanted = names or list(SETS)
    paths = {name: folder / f"{name}.h5ad" for name in wanted}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing and (names or len(missing) == len(wanted)):
        msg = f"{folder} has no {', '.join(f'{name}.h5ad' for name in missing)}"
        raise SystemExit(msg)
    if missing:
        print(f"Not in the folder, left out: {', '.join(missing)}")
    return {name: path for name, path in paths.items() if name not in missing}


def read_cells(path: Path, n_cells: int | None, *, seed: int, labelled: bool) -> ad.AnnData:
    """A seeded sample of the cells of a file; `labelled` leaves out those without a label."""
    adata = ad.read_h5ad(path)
    rows = np.arange(adata.n_obs)
    if labelled:
        rows = rows[~adata.obs[LABEL_KEY].astype(str).isin(NO_LABEL).to_numpy()]
    return adata[np.sort(np.random.default_rng(seed).permutation(rows)[:n_cells])].copy()


def asked_batches(model: af.ScGPT, cells: CellBatch, shares: Sequence[float], *, seed: int) -> Iterator[tuple[float, TokenBatch]]:
    """The cells' tokens with each share asked for; the same cell gets the same question always."""
    tokens = model.tokenize(cells)
    for share in shares:
        yield share, ask(tokens, [share], seed=seed)


def split_matrices(tokens: TokenBatch, n_genes: int) -> tuple[sp.csr_array, sp.csr_array]:
    """Values of the visible and of the asked genes, cell x token of the vocabulary."""
    assert tokens.targets is not None
    targets = tokens.targets.numpy()
    asked = np.isfinite(targets)
    visible = ~asked
    visible[tokens.offsets[:-1].numpy()] = False
    return _matrix(tokens, tokens.values.numpy(), visible, n_genes), _matrix(tokens, targets, asked, n_genes)


def _matrix(tokens: TokenBatch, values: np.ndarray, where: np.ndarray, n_genes: int) -> sp.csr_array:
    starts = np.concatenate([[0], np.cumsum(where)])[tokens.offsets.numpy()]
    return sp.csr_array((values[where], tokens.gene_ids.numpy()[where].astype(np.int32), starts), shape=(tokens.n_cells, n_genes))


def whole(adata: ad.AnnData, model: af.ScGPT) -> CellBatch:
    """All cells of an AnnData over the model's vocabulary."""
    return next(iter(AnnDataSource(adata).batches(adata.n_obs, vocab=model.vocab)))


def interval(draws: np.ndarray) -> tuple[float, float]:
    """95 % of the bootstrap draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def resampled_mean(values: Mapping[str, np.ndarray], *, seed: int, n_draws: int = 1_000) -> np.ndarray:
    """Bootstrap draws of the mean over sets: sources are drawn with replacement with all their sets.

    `values`: set -> its value, or `n_draws` draws of it.
    """
    sources: dict[str, list[str]] = {}
    for name in values:
        sources.setdefault(SETS.get(name, name), []).append(name)
    given = [np.stack([np.broadcast_to(values[name], n_draws) for name in names]) for names in sources.values()]
    total, count = np.stack([of.sum(0) for of in given]), np.array([len(of) for of in given])
    taken = np.random.default_rng(seed).integers(len(given), size=(n_draws, len(given)))
    return total[taken, np.arange(n_draws)[:, None]].sum(1) / count[taken].sum(1)


def means_over(names: Iterable[str]) -> dict[str, list[str]]:
    """Sets that means are taken over: all, and all but those of the source that the corpus may share a donor with."""
    every = list(names)
    others = [name for name in every if SETS.get(name) != SHARED_SOURCE]
    return {"mean of sets": every} | ({f"mean without {SHARED_SOURCE}": others} if 0 < len(others) < len(every) else {})


def verdict(low: float, high: float, *, even: float, less_is_better: bool) -> str:
    """*beats*, *loses* or *ties*, from the interval of a ratio or a difference and its value where both are alike."""
    if low <= even <= high:
        return "ties"
    return "beats" if (high < even) == less_is_better else "loses"
