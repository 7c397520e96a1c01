"""Whether genes that work together are neighbours in the model's table of genes (part of pretraining.py)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

import annformer as af
from annformer.evaluate import expression_strata, neighbour_scores, partner_ranks
from annformer.train.gene_init import axes_of_variation, token_expression
from pretraining_cells import Corpus
from pretraining_clusters import MODEL, RANDOM, random_network

FAMILIES = {
    "HLA class I": ("HLA-A", "HLA-B", "HLA-C", "HLA-E", "HLA-F"),
    "HLA class II": (
        *("HLA-DRA", "HLA-DRB1", "HLA-DPA1", "HLA-DPB1", "HLA-DQA1", "HLA-DQB1"),
        *("HLA-DMA", "HLA-DMB", "CD74"),
    ),
    "CD3 complex": ("CD3D", "CD3E", "CD3G", "CD247"),
    "CD79": ("CD79A", "CD79B"),
}
SVD = "co-expression SVD"
N_CELLS_SVD = 6_000


def corpus_expression(corpus: Corpus) -> sp.csr_array:
    """Log-normalised expression of the corpus, cell x token of the vocabulary."""
    parts = [token_expression(cells, len(corpus.model.vocab)) for cells in corpus.batches(corpus.rows)]
    return sp.csr_array(sp.vstack(parts, format="csr"))


def svd_embedding(expression: sp.csr_array, width: int, *, seed: int) -> np.ndarray:
    """Genes by singular vectors times singular values of a sample of cells; a gene table may start from the same vectors."""
    some = np.sort(np.random.default_rng(seed).permutation(expression.shape[0])[:N_CELLS_SVD])
    axes, values = axes_of_variation(expression[some], width, seed=seed)
    return axes * values


def embeddings(model: af.ScGPT, expression: sp.csr_array, n_random: int, *, seed: int) -> dict[str, np.ndarray]:
    """Name -> all tokens of the vocabulary in rows."""
    ids = torch.arange(len(model.vocab))
    networks = {MODEL: model} | {f"{RANDOM} #{number}": random_network(model, seed + number) for number in range(n_random)}
    with torch.inference_mode():
        found = {name: network.encoder.gene_embedding(ids).float().numpy() for name, network in networks.items()}
    return found | {SVD: svd_embedding(expression, model.config.model.width, seed=seed)}


def tables(model: af.ScGPT, corpus: Corpus, *, n_random: int, n_draws: int, seed: int) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Tables by name, and what to say under them."""
    expression = corpus_expression(corpus)
    known = np.flatnonzero(model.vocab.is_gene & model.vocab.is_trained)
    place = {model.vocab.tokens[gene]: row for row, gene in enumerate(known)}
    sets, missing = _families(place)
    strata = expression_strata(expression.mean(axis=0)[known])
    found, ranks = [], []
    for name, table in embeddings(model, expression, n_random, seed=seed).items():
        scores = neighbour_scores(table[known], sets, strata=strata, n_draws=n_draws, seed=seed)
        found.append(scores.assign(embedding=name))
        ranks += [_long(name, family, partner_ranks(table[known], members), known, model) for family, members in sets.items()]
    scores = pd.concat(found, ignore_index=True)
    notes = [
        f"Rank of every member of a set among the {len(known) - 1:,} other trained genes, by cosine to every other member: median over"
        f" the pairs. p: {n_draws:,} random sets of as many genes of the same deciles of mean expression in the corpus.",
        f"Random networks: median over {n_random}, of p too. {SVD}: {model.config.model.width} components, genes scaled.",
    ]
    notes += [f"Not among the trained genes: {', '.join(missing)}."] if missing else []
    return {"genes": summary(scores), "genes_all": scores, "genes_ranks": pd.concat(ranks, ignore_index=True)}, notes


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """A row per set; for each embedding the median rank and p."""
    of = scores.assign(kind=scores["embedding"].str.replace(r" #\d+$", "", regex=True)).groupby(["set", "n_genes", "kind"], sort=False)
    each = of.agg(
        median=("median_rank", "median"), null=("null_rank", "median"), best=("best_rank", "first"), p=("p", "median")
    ).reset_index()
    each["text"] = [f"{row.median:,.0f} (p = {row.p:.2g})" for row in each.itertuples(index=False)]
    wide = each.pivot_table("text", ["set", "n_genes", "best"], "kind", aggfunc="first", sort=False)
    null = each[each["kind"] == MODEL].set_index("set")["null"]
    return wide.reset_index().assign(**{"model's random sets": lambda table: table["set"].map(null)})


def _families(place: Mapping[str, int]) -> tuple[dict[str, np.ndarray], list[str]]:
    found = {name: np.array([place[gene] for gene in genes if gene in place], dtype=np.int64) for name, genes in FAMILIES.items()}
    missing = [gene for genes in FAMILIES.values() for gene in genes if gene not in place]
    return {name: members for name, members in found.items() if len(members) > 1}, missing


def _long(name: str, family: str, ranks: np.ndarray, known: np.ndarray, model: af.ScGPT) -> pd.DataFrame:
    genes = [gene for gene in FAMILIES[family] if gene in model.vocab and model.vocab[gene] in set(known.tolist())]
    pairs = [(a, b, ranks[i, j]) for i, a in enumerate(genes) for j, b in enumerate(genes) if i != j]
    return pd.DataFrame(pairs, columns=["gene", "partner", "rank"]).assign(embedding=name, set=family)
