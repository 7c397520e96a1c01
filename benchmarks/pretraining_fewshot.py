"""Cell types from a few labelled cells: the fine-tuned model, the same network from scratch, frozen ones, logistic regression (part of
pretraining.py)."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

import annformer as af
from annformer.baselines import ANNOTATION
from annformer.evaluate import classification_scores, draws
from annformer.evaluate.classification import macro_f1_on_draws
from annformer.tasks._annotation_recipe import AnnotationRecipe
from pretraining_cells import LABEL_KEY, interval, read_cells, resampled_mean, verdict
from pretraining_clusters import random_network

SETS = ("pbmc3k", "kang_ifnb_pbmc", "zheng_sorted_mudan")
TEST = 400
"""Cells of a set that are called; they are never labelled."""
MIN_CELLS = 10
"""Types with fewer cells of a set are left out."""
CELLS_SEEN, LEAST_EPOCHS = 4_000, 8
"""Training goes on until so many cells were seen, and for so many epochs."""
TUNED, LOW_RANK, SCRATCH, LOW_RANK_RANDOM = "fine-tuned", "low rank", "from scratch", "low rank, random network"
FROZEN, FROZEN_RANDOM = "frozen", "frozen random network"
LOGISTIC, LOGISTIC_VARIABLE = "logistic regression all genes", "logistic regression HVG"
TUNINGS = {
    TUNED: ("full", True, 1e-3),
    SCRATCH: ("full", False, 1e-3),
    LOW_RANK: ("low-rank", True, 3e-3),
    LOW_RANK_RANDOM: ("low-rank", False, 3e-3),
}
"""Method -> what is fine-tuned, whether from the pretrained weights, at which rate. Not chosen by any of the sets: customary values."""
PAIRS = (
    (TUNED, SCRATCH),
    (LOW_RANK, LOW_RANK_RANDOM),
    (FROZEN, FROZEN_RANDOM),
    (TUNED, LOGISTIC),
    (LOW_RANK, LOGISTIC),
    (FROZEN, LOGISTIC),
)
N_DRAWS = 1_000

Caller = Callable[[AnnData, AnnData, int], np.ndarray]
"""(labelled cells, others, seed) -> types of the others."""


def callers(model: af.ScGPT, *, seed: int) -> dict[str, Caller]:
    """Every method by name."""
    other = random_network(model, seed)

    def network(start: af.ScGPT, tuning: str, rate: float, labelled: AnnData, asked: AnnData, seed: int, *, pretrained: bool) -> np.ndarray:
        epochs = max(LEAST_EPOCHS, CELLS_SEEN / labelled.n_obs)
        steps = {"tokens_per_step": 2_048, "tokens_per_forward": 2_048, "patience": None, "validations": 0}
        settings = {"tuning": tuning, "depths": [], "view": False, "train": {"epochs": epochs, "learning_rate": rate} | steps}
        recipe = AnnotationRecipe.read(settings, where="few-shot")
        made = af.CellTypeClassifier(start, label_key=LABEL_KEY, recipe=recipe, pretrained=pretrained, seed=seed)
        return _types(made.fit(labelled), asked)

    def tuned(name: str) -> Caller:
        tuning, pretrained, rate = TUNINGS[name]
        return lambda labelled, asked, seed: network(model, tuning, rate, labelled, asked, seed, pretrained=pretrained)

    def frozen(start: af.ScGPT) -> Caller:
        return lambda labelled, asked, seed: network(start, "frozen", 1e-3, labelled, asked, seed, pretrained=True)

    def floor(name: str) -> Caller:
        def call(labelled: AnnData, asked: AnnData, seed: int) -> np.ndarray:
            types = labelled.obs[LABEL_KEY].astype(str).to_numpy()
            return ANNOTATION[name](labelled.X, types, asked.X, np.asarray(labelled.var_names), seed=seed).types

        return call

    return (
        {name: tuned(name) for name in TUNINGS}
        | {FROZEN: frozen(model), FROZEN_RANDOM: frozen(other)}
        | {name: floor(name) for name in (LOGISTIC, LOGISTIC_VARIABLE)}
    )


def _types(classifier: af.CellTypeClassifier, asked: AnnData) -> np.ndarray:
    said = classifier.predict(asked, unassigned_above=None, copy=True).obs["predicted_cell_type"]
    return said.astype(str).to_numpy()


class Cells:
    """Labelled cells of a set: some to be called, the others to draw from."""

    def __init__(self, path: Path, *, seed: int) -> None:
        adata = read_cells(path, None, seed=seed, labelled=True)
        names = adata.obs[LABEL_KEY].astype(str)
        adata = adata[names.isin(names.value_counts().loc[lambda n: n >= MIN_CELLS].index)].copy()
        order = np.random.default_rng(seed).permutation(adata.n_obs)
        n_test = min(TEST, adata.n_obs // 3)
        self.adata, self.pool = adata, order[n_test:]
        self.asked = adata[order[:n_test]].copy()
        self.truth = self.asked.obs[LABEL_KEY].astype(str).to_numpy()
        del self.asked.obs[LABEL_KEY]

    def labelled(self, n: int, seed: int) -> AnnData:
        """`n` cells of the pool, two of every type at least; more cells hold the fewer."""
        order = np.random.default_rng([seed, n]).permutation(self.pool)
        place = self.adata.obs[LABEL_KEY].iloc[order].to_frame().groupby(LABEL_KEY, observed=True).cumcount().to_numpy()
        return self.adata[np.concatenate([order[place < 2], order[place >= 2]])[:n]].copy()


class Runs:
    """What each run said, kept in a CSV, so that an interrupted benchmark goes on where it stopped."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.said: dict[tuple[str, ...], list[str]] = {}
        if path is not None and path.is_file():
            with path.open(newline="") as file:
                for *key, types in csv.reader(file):
                    self.said[tuple(key)] = types.split("\t")

    def get(self, key: tuple[object, ...], n: int, call: Callable[[], np.ndarray]) -> np.ndarray:
        """Types that a run gave; it is made where it was not, or where its line broke off."""
        words = tuple(map(str, key))
        if len(self.said.get(words, [])) != n:
            began = time.perf_counter()
            self.said[words] = list(call())
            print(f"{', '.join(words[1:])}: {time.perf_counter() - began:.0f} s", flush=True)
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", newline="") as file:
                    csv.writer(file).writerow([*words, "\t".join(self.said[words])])
        return np.array(self.said[words])


def tables(
    model: af.ScGPT, sets: Mapping[str, Path], *, sizes: Sequence[int], n_seeds: int, seed: int, runs: Path | None
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Tables by name, and what to say under them."""
    kept, by_name = Runs(runs), callers(model, seed=seed)
    protocol = f"{model.fingerprint[:12]} {CELLS_SEEN} {LEAST_EPOCHS} {TEST} {seed} {TUNINGS}"
    rows: list[dict[str, object]] = []
    drawn: dict[int, dict[str, dict[str, np.ndarray]]] = {n: {} for n in sizes}
    level = logging.getLogger("annformer").level
    logging.getLogger("annformer").setLevel(logging.ERROR)
    for name, path in sets.items():
        cells = Cells(path, seed=seed)
        samples = list(draws(None, cells.truth, N_DRAWS, seed))
        for n in (n for n in sizes if n <= len(cells.pool)):
            found: dict[str, list[np.ndarray]] = {method: [] for method in by_name}
            for draw in range(n_seeds):
                labelled = cells.labelled(n, draw)
                for method, call in by_name.items():
                    types = kept.get((protocol, name, n, draw, method), len(cells.truth), lambda: call(labelled, cells.asked, draw))  # noqa: B023
                    rows.append({"labelled": n, "set": name, "draw": draw, "method": method} | classification_scores(cells.truth, types))
                    found[method].append(macro_f1_on_draws(cells.truth, types, samples))
            drawn[n][name] = {method: np.mean(each, axis=0) for method, each in found.items()}
    logging.getLogger("annformer").setLevel(level)
    scores = pd.DataFrame(rows)
    notes = [
        f"Mean of {n_seeds} draws of the labelled cells; {TEST} test cells a set at most, which are never drawn.",
        "Networks by `CellTypeClassifier` without its expression part, 2,000 variable genes, 128 of them in a training step, until"
        f" {CELLS_SEEN:,} cells were seen and for {LEAST_EPOCHS} epochs at least; rates 0.001, low rank 0.003, for all starts alike and"
        " chosen on none of the sets. From scratch, random network: the same with random weights. Frozen: a linear head on the embedding.",
        "Logistic regression as in `annformer compare annotate`, penalties chosen inside of the labelled cells.",
        "Intervals: 95 %, bootstrap over test cells within their types; of the mean, over sets and cells; draws are averaged.",
    ]
    differences = pd.DataFrame(
        row for n in sizes if drawn[n] for row in _differences(scores[scores["labelled"] == n], drawn[n], n, seed=seed)
    )
    return {"fewshot": _means(scores), "fewshot_difference": differences, "fewshot_all": scores}, notes


def _means(scores: pd.DataFrame) -> pd.DataFrame:
    """Macro-F1 of each set and method, and the mean over sets for each number of labelled cells."""
    table = scores.pivot_table("macro_f1", ["labelled", "set"], "method", sort=False).reset_index()
    means = table.drop(columns="set").groupby("labelled").mean().reset_index().assign(set="mean of sets")
    return pd.concat([table, means]).sort_values("labelled", kind="stable")[list(table.columns)].reset_index(drop=True)


def _differences(scores: pd.DataFrame, drawn: Mapping[str, Mapping[str, np.ndarray]], n: int, *, seed: int) -> Iterator[dict[str, object]]:
    """The model less what it is held against, with verdicts: a row per set, and one for their mean."""
    mean = scores.pivot_table("macro_f1", "set", "method", sort=False)
    for title, names in [*((name, [name]) for name in drawn), ("mean of sets", list(drawn))]:
        row: dict[str, object] = {"labelled": n, "set": title}
        for ours, other in PAIRS:
            each = {name: drawn[name][ours] - drawn[name][other] for name in names}
            low, high = interval(next(iter(each.values())) if len(names) == 1 else resampled_mean(each, seed=seed))
            difference = (mean[ours] - mean[other]).loc[list(names)].mean()
            row[f"{ours} less {other}"] = (
                f"{difference:+.3f} ({low:+.3f} to {high:+.3f}) {verdict(low, high, even=0, less_is_better=False)}"
            )
        yield row
