"""Corrected expression of a real set: how far studies lie apart within a type, and whether the difference of types is kept.

    python benchmarks/corrected_expression.py --data FOLDER [--set pancreas_3studies] [--seeds 1]

FOLDER holds the set as an .h5ad file with obs "batch" and "cell_type". Expression is log-normalised, over the genes that the integration
reads. A gap is the mean over genes of the absolute difference between the means of a type in two batches.
"""

from __future__ import annotations

import argparse
import logging
from itertools import combinations
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

import annformer as af
from _timing import machine, print_table
from annformer.baselines import log_normalised
from annformer.tasks._integration_recipe import IntegrationRecipe

MEASURED, CORRECTED = "as measured", "as corrected"


def expression(adata: ad.AnnData, corrected: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Both accounts of the same cells over the same genes."""
    measured = pd.DataFrame(log_normalised(adata.X).toarray(), index=adata.obs_names, columns=adata.var_names)
    return {MEASURED: measured[corrected.columns], CORRECTED: corrected}


def type_means(table: pd.DataFrame, obs: pd.DataFrame) -> pd.DataFrame:
    """Mean expression by type and batch (rows), where a batch has the type."""
    return table.groupby([obs["cell_type"].astype(str), obs["batch"].astype(str)]).mean()


def gaps(means: pd.DataFrame) -> dict[tuple[str, str, str], float]:
    """Type and two batches -> how far the means of the type lie apart between them."""
    found = {}
    for kind, rows in means.groupby(level=0):
        for (_, one), (_, other) in combinations(rows.index, 2):
            found[str(kind), one, other] = float(np.abs(rows.loc[(kind, one)] - rows.loc[(kind, other)]).mean())
    return found


def of_types(means: pd.DataFrame, one: str, other: str) -> pd.Series:
    """Difference of two types by gene: the mean over the batches that have both."""
    first, second = means.loc[one], means.loc[other]
    both = first.index.intersection(second.index)
    return (first.loc[both] - second.loc[both]).mean()


def measure(adata: ad.AnnData, model: str, seed: int, threads: int | None, **recipe: Any) -> tuple[list[list[object]], list[list[object]]]:
    """Rows of both tables with one seed: gaps, and correlations of what tells types apart."""
    settings = IntegrationRecipe.named("integrate").with_(**recipe)
    integrator = af.BatchIntegrator(model, batch_key="batch", recipe=settings, seed=seed, threads=threads).fit(adata)
    found = integrator.corrected(adata, copy=True)
    assert found is not None, "a copy is returned"
    means = {name: type_means(table, adata.obs) for name, table in expression(adata, found.obsm["annformer_corrected"]).items()}
    apart = {name: gaps(table) for name, table in means.items()}
    rows: list[list[object]] = [[seed, *where, apart[MEASURED][where], apart[CORRECTED][where]] for where in apart[MEASURED]]
    agree: list[list[object]] = []
    for one, other in combinations(sorted(adata.obs["cell_type"].astype(str).unique()), 2):
        both = [of_types(table, one, other).to_numpy() for table in means.values()]
        agree.append([seed, one, other, len(both[0]), float(np.corrcoef(*both)[0, 1]), float(np.std(both[1]) / np.std(both[0]))])
    return rows, agree


def main(words: list[str] | None = None) -> None:
    """Fit, decode, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", default="pancreas_3studies")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--model", default="annformer-base")
    parser.add_argument("--least_steps", type=int, help="fewer steps than the recipe makes, to see that the script runs")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    adata = ad.read_h5ad(given.data / f"{given.set}.h5ad")
    few = {} if given.least_steps is None else {"least_steps": given.least_steps}
    rows: list[list[object]] = []
    agree: list[list[object]] = []
    for seed in range(given.seeds):
        more, also = measure(adata, given.model, seed, given.threads, **few)
        rows, agree = rows + more, agree + also
    print_table(f"{given.set}: gap between batches", ["seed", "type", "batch", "other batch", MEASURED, CORRECTED], rows)
    columns = ["seed", "type", "other type", "genes", "correlation", "spread, corrected / measured"]
    print_table(f"{given.set}: what tells types apart, as corrected against as measured", columns, agree)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
