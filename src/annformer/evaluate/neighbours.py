"""Whether genes that belong together are neighbours in an embedding of genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

ROWS_AT_A_TIME = 512
"""Genes whose similarities to all others are in memory at once."""


def neighbour_scores(
    embedding: Float[np.ndarray, "gene width"],
    sets: Mapping[str, Sequence[int] | Int[np.ndarray, "member"]],
    *,
    strata: Int[np.ndarray, "gene"],
    n_draws: int = 2_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score sets of genes: how near each member has the others, and whether random sets of like genes do as well.

    A partner's rank is its place among all other genes in the order of their cosine to the member; 1 is the nearest. A random set takes,
    in the place of every member, another gene of its stratum, and has no gene twice.

    Parameters
    ----------
    embedding
        Genes in rows.
    sets
        Name -> rows of its genes; at least two.
    strata
        A class for each gene, such as the decile of its expression: genes that are expressed alike tend to lie together for that alone.
    n_draws
        Random sets for each set.

    Returns
    -------
    One row per set: `set`, `n_genes`, `median_rank` over the ordered pairs of members, `best_rank` (the least that many genes can
    have), `null_rank` (median over the random sets), `p`: (1 + random sets with at most this median rank) / (1 + random sets).
    """
    unit = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
    rng = np.random.default_rng(seed)
    rows = []
    for name, members in sets.items():
        genes = np.asarray(members, dtype=np.int64)
        assert len(np.unique(genes)) == len(genes) >= 2, f"the set {name} needs two different genes at least"
        found = float(_median_ranks(unit, genes[None])[0])
        null = _median_ranks(unit, _random_sets(genes, strata, n_draws, rng))
        p = (1 + int((null <= found).sum())) / (1 + n_draws)
        scores = {
            "median_rank": found,
            "best_rank": float(np.median(np.arange(1, len(genes)))),
            "null_rank": float(np.median(null)),
            "p": p,
        }
        rows.append({"set": name, "n_genes": len(genes), **scores})
    return pd.DataFrame(rows)


def partner_ranks(embedding: Float[np.ndarray, "gene width"], members: Int[np.ndarray, "member"]) -> Int[np.ndarray, "member member"]:
    """Rank of every member (column) among all other genes in the order of their cosine to a member (row); 0 on the diagonal."""
    unit = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
    return _ranks(unit, members[None])[0]


def expression_strata(expression: Float[np.ndarray, "gene"], n_strata: int = 10) -> Int[np.ndarray, "gene"]:
    """Number of the gene's quantile of expression; the quantiles are equally large."""
    order = np.argsort(np.argsort(expression, kind="stable"), kind="stable")
    return order * n_strata // len(expression)


def _median_ranks(unit: Float[np.ndarray, "gene width"], sets: Int[np.ndarray, "set member"]) -> Float[np.ndarray, "set"]:
    apart = ~np.eye(sets.shape[1], dtype=bool)
    return np.median(_ranks(unit, sets)[:, apart], axis=1)


def _ranks(unit: Float[np.ndarray, "gene width"], sets: Int[np.ndarray, "set member"]) -> Int[np.ndarray, "set member member"]:
    n_sets, size = sets.shape
    members, partners = sets.ravel(), np.repeat(sets, size, axis=0)
    ranks = np.empty((len(members), size), dtype=np.int64)
    for first in range(0, len(members), ROWS_AT_A_TIME):
        some = slice(first, first + ROWS_AT_A_TIME)
        cosines = unit[members[some]] @ unit.T
        theirs = np.take_along_axis(cosines, partners[some], axis=1)
        np.put_along_axis(cosines, members[some, None], -np.inf, axis=1)  # a gene is no neighbour of itself
        cosines.sort(axis=1)
        for row, (ordered, values) in enumerate(zip(cosines, theirs, strict=True), first):
            ranks[row] = 1 + len(ordered) - np.searchsorted(ordered, values, side="right")
    pairs = ranks.reshape(n_sets, size, size)
    pairs[:, np.arange(size), np.arange(size)] = 0
    return pairs


def _random_sets(
    members: Int[np.ndarray, "member"], strata: Int[np.ndarray, "gene"], n_draws: int, rng: np.random.Generator
) -> Int[np.ndarray, "draw member"]:
    """Sets of other genes with the members' strata."""
    sets = np.empty((n_draws, len(members)), dtype=np.int64)
    free = np.ones(len(strata), dtype=bool)
    free[members] = False
    for stratum in np.unique(strata[members]):
        places = np.flatnonzero(strata[members] == stratum)
        pool = np.flatnonzero(free & (strata == stratum))
        assert len(pool) >= len(places), "a stratum needs as many other genes as the set has members in it"
        for draw in range(n_draws):
            sets[draw, places] = rng.choice(pool, len(places), replace=False, shuffle=False)
    return sets
