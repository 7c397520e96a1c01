"""Cell types from few labelled cells: 10, 50, 200 of each type, by annformer, the same with a random network, and simple methods.

    python benchmarks/annotation_fewshot.py --data FOLDER [--sets kang_muscat_8donors zheng_sorted_mudan] [--seeds 3] [--out TABLE.csv]

The labelled cells are drawn anew with every seed, all methods get the same; the types of at most 2,000 others are then called. A type with
fewer than twice as many cells gives half of its cells.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from _timing import machine, print_table
from annformer import embed
from annformer.baselines import ANNOTATION
from annformer.evaluate import classification_scores
from annformer.evaluate.integration import UNLABELLED
from annformer.scgpt import ScGPT
from annformer.tasks.annotation import CellTypeClassifier
from integration import read

SIZES = (10, 50, 200)
MOST_CALLED = 2_000
FLOORS = (
    "logistic regression all genes",
    "logistic regression HVG",
    "logistic regression balanced",
    "CellTypist",
    "CellTypist feature selection",
    "kNN PCA",
)


def drawn(labels: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are learned from, and rows that are called."""
    rng = np.random.default_rng([seed, n])
    order = pd.Series(rng.permutation(len(labels)))
    place = order.groupby(labels[order]).cumcount().to_numpy()
    size = order.map(dict(enumerate(pd.Series(labels).map(pd.Series(labels).value_counts())))).to_numpy()
    learned = place < np.minimum(n, size // 2)
    return np.sort(order[learned]), np.sort(order[~learned].to_numpy()[:MOST_CALLED])


def untrained(model: ScGPT) -> ScGPT:
    """Make the same network with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ScGPT(model.config, model.vocab).eval()


def called(cells: AnnData, models: dict[str, ScGPT], learned: np.ndarray, asked: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Types by every method."""
    reference, query = cells[learned].copy(), cells[asked].copy()
    labels = reference.obs["cell_type"].astype(str).to_numpy()
    del query.obs["cell_type"]
    found = {}
    for name, model in models.items():
        classifier = CellTypeClassifier(model, label_key="cell_type", seed=seed).fit(reference, embedding=name)
        obs = classifier.predict(query, embedding=name, unassigned_above=None, copy=True).obs
        found[name] = obs["predicted_cell_type"].astype(str).to_numpy()
        found[f"{name}, network part"] = obs["predicted_cell_type_by_network"].astype(str).to_numpy()
        found["expression part"] = obs["predicted_cell_type_by_expression"].astype(str).to_numpy()
    for name in FLOORS:
        found[name] = ANNOTATION[name](reference.X, labels, query.X, np.asarray(cells.var_names), seed=seed).types
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["kang_muscat_8donors", "zheng_sorted_mudan"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="annformer-base")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model = ScGPT.from_pretrained(given.model)
    models = {"pretrained": model, "random network": untrained(model)}
    rows = []
    for name in given.sets:
        cells = read(given.data, name)
        cells = cells[~cells.obs["cell_type"].astype(str).isin(UNLABELLED)].copy()
        labels = cells.obs["cell_type"].astype(str).to_numpy()
        for key, network in models.items():
            embed(cells, network, key_added=key, progress=False)
        for n in SIZES:
            for seed in range(given.seeds):
                print(f"{name}: {n} of each type, seed {seed}", flush=True)
                learned, asked = drawn(labels, n, seed)
                for method, types in called(cells, models, learned, asked, seed).items():
                    scores = classification_scores(labels[asked], types)
                    rows.append({"set": name, "cells per type": n, "method": method, "seed": seed} | scores)
        table = pd.DataFrame(rows)
        of_set = table[table["set"] == name].groupby(["method", "cells per type"], sort=False)["macro_f1"]
        shown = of_set.agg(lambda scores: f"{scores.mean():.3f} ± {scores.std(ddof=1):.3f}").unstack().reset_index()
        print_table(f"{name}: macro-F1", [str(column) for column in shown], shown.to_numpy().tolist())
        if given.out is not None:
            table.to_csv(given.out, index=False)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
