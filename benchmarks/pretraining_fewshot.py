"""Cell types from a few labelled cells: the fine-tuned model, the network from scratch, logistic regression (part of pretraining.py)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.sparse import issparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import annformer as af
from annformer.objectives.cls import CLS
from annformer.scgpt import ModelFolderConfig
from annformer.tokenizer import TokenizerSettings, tokenize
from annformer.tokens import CellBatch, TokenBatch
from pretraining_cells import LABEL_KEY, interval, one_thread, read_cells, resampled_mean, verdict, whole
from pretraining_clusters import log_normalised, random_network

SETS = ("zheng_sorted_mudan", "pbmc3k", "kang_ifnb_pbmc", "sc_mixology_lung_cell_lines")
PRETRAINED, SCRATCH, LOGISTIC = "pretrained", "from scratch", "logistic regression"
FROZEN, FROZEN_RANDOM = "pretrained, frozen", "random, frozen"
MAX_LENGTH = 150
"""Tokens of a cell in a training step, drawn anew in each."""
MAX_LENGTH_TEST = 400
CELLS_PER_STEP = 16
N_STEPS = 100
RATES = (1e-3, 3e-3)
WARM_UP = 0.1
DROPOUT = 0.0
WEIGHT_DECAY = 0.01
POOL, TEST = 1_000, 300
MIN_CELLS = 10
"""Of a type; rarer ones are left out."""
STRENGTHS = tuple(f"{strength:g}{scaled}" for scaled in ("", " scaled") for strength in (0.1, 1, 10, 100, 1000))
"""Inverse penalties of the logistic regression; with or without dividing each gene by its deviation."""
N_DRAWS = 1_000

Method = Callable[[Any, np.ndarray, int, np.ndarray], np.ndarray]
"""(setting, labelled rows, seed, rows to predict) -> codes of the types."""


class Task(NamedTuple):
    """A labelled set, cut once into a pool that labelled cells are drawn from and test cells that nothing is chosen on."""

    cells: CellBatch
    features: dict[str, Any]
    """What logistic regressions read, by method: expression, and the cell states of networks that are not trained on."""
    labels: np.ndarray
    types: tuple[str, ...]
    pool: np.ndarray
    test: np.ndarray

    def labelled(self, n: int, seed: int) -> np.ndarray:
        """`n` cells of the pool, of every type one at least where there are as many places."""
        order = np.random.default_rng([seed, n]).permutation(self.pool)
        _, first = np.unique(self.labels[order], return_index=True)
        return np.concatenate([order[first], np.delete(order, first)])[:n]


def read_task(adata: AnnData, model: af.ScGPT, *, seed: int) -> Task:
    """Cut a set; at most three quarters of it, and not more than `POOL` cells, may be labelled."""
    names = adata.obs[LABEL_KEY].astype(str)
    adata = adata[names.isin(names.value_counts().loc[lambda n: n >= MIN_CELLS].index)].copy()
    types, labels = np.unique(adata.obs[LABEL_KEY].astype(str), return_inverse=True)
    order = np.random.default_rng(seed).permutation(adata.n_obs)
    n_pool = min(POOL, adata.n_obs * 3 // 4)
    task = Task(whole(adata, model), {LOGISTIC: log_normalised(adata).X}, labels, tuple(types), order[:n_pool], order[n_pool:][:TEST])
    networks = {FROZEN: model, FROZEN_RANDOM: random_network(model, seed)}
    return task._replace(features=task.features | {name: states(network, task) for name, network in networks.items()})


def tokens_of(task: Task, model: af.ScGPT, rows: np.ndarray, settings: TokenizerSettings, *, step: int = 0) -> TokenBatch:
    """The cells' tokens with their labels."""
    some = task.cells._replace(counts=task.cells.counts[rows], rows=rows, labels={LABEL_KEY: task.labels[rows]})
    return tokenize(some, settings, cls_id=model.vocab.cls_id, step=step)


def with_classifier(model: af.ScGPT, n_classes: int, *, seed: int) -> af.ScGPT:
    """The model's encoder with a new head for cell types instead of its objectives."""
    network = {**model.config.model.model_dump(), "dropout": DROPOUT}
    settings = {"model": network, "objectives": {"cls": {"kind": "cls", "n_classes": n_classes}}}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        new = af.ScGPT(ModelFolderConfig.model_validate(model.config.model_dump() | settings), model.vocab)
    new.encoder.load_state_dict(model.encoder.state_dict())
    return new


def fine_tune(model: af.ScGPT, task: Task, rows: np.ndarray, *, rate: float, n_steps: int, seed: int) -> af.ScGPT:
    """AdamW, warm-up and linear decay, cells drawn in seeded passes; whatever part of a long cell is read differs from step to step."""
    one_thread()
    tuned = with_classifier(model, len(task.types), seed=seed).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=rate, weight_decay=WEIGHT_DECAY, fused=True)
    short = tuned.tokenizer.with_(max_length=min(MAX_LENGTH, tuned.tokenizer.max_length))
    passes = -(-n_steps * CELLS_PER_STEP // len(rows))
    order = np.concatenate([np.random.default_rng([seed, number]).permutation(rows) for number in range(passes)])
    for step in range(n_steps):
        done = (step + 1) / n_steps
        optimizer.param_groups[0]["lr"] = rate * min(done / WARM_UP, (1 - done) / (1 - WARM_UP) + 1 / n_steps)
        tokens = tokens_of(task, tuned, order[step * CELLS_PER_STEP : (step + 1) * CELLS_PER_STEP], short, step=step)
        tuned.losses(tokens)["cls"].mean.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return tuned.eval()


def states(model: af.ScGPT, task: Task) -> np.ndarray:
    """Cell states of pool and test cells; cells that are neither stay zero."""
    one_thread()
    rows = np.concatenate([task.pool, task.test])
    found = np.zeros((len(task.labels), model.config.model.width), dtype=np.float32)
    settings = model.tokenizer.with_(max_length=min(MAX_LENGTH_TEST, model.tokenizer.max_length))
    with torch.inference_mode():
        for first in range(0, len(rows), 8):
            some = rows[first : first + 8]
            found[some] = model.encode(tokens_of(task, model, some, settings), "cell").cell.numpy()
    return found


def predict(model: af.ScGPT, task: Task, rows: np.ndarray) -> np.ndarray:
    """Codes of the types."""
    head = model.objectives["cls"]
    assert isinstance(head, CLS)
    settings = model.tokenizer.with_(max_length=min(MAX_LENGTH_TEST, model.tokenizer.max_length))
    with torch.inference_mode():
        parts = [tokens_of(task, model, rows[first : first + 8], settings) for first in range(0, len(rows), 8)]
        return np.concatenate([head.predict(model.encode(tokens, "cell")).argmax(1).numpy() for tokens in parts])


def methods(model: af.ScGPT, task: Task, *, n_steps: int, seed: int) -> dict[str, tuple[Method, Sequence[Any]]]:
    """Name -> how it predicts, and the settings to choose from."""

    def tuned(start: Callable[[int], af.ScGPT]) -> Method:
        return lambda rate, rows, of, asked: predict(
            fine_tune(start(of), task, rows, rate=rate, n_steps=n_steps, seed=seed + of), task, asked
        )

    def logistic(name: str) -> Method:
        return lambda setting, rows, of, asked: _logistic(task.features[name], task.labels, setting, rows, asked)  # noqa: ARG005

    return {
        PRETRAINED: (tuned(lambda _: model), RATES),
        SCRATCH: (tuned(lambda of: random_network(model, seed + of)), RATES),
        **{name: (logistic(name), STRENGTHS) for name in task.features},
    }


def _logistic(features: Any, labels: np.ndarray, setting: str, rows: np.ndarray, asked: np.ndarray) -> np.ndarray:
    strength, _, scaled = setting.partition(" ")
    scaler = StandardScaler(with_mean=not issparse(features)) if scaled else "passthrough"
    classifier = make_pipeline(scaler, LogisticRegression(C=float(strength), max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the weakest penalties need not converge to be judged
        return classifier.fit(features[rows], labels[rows]).predict(features[asked])


def choose(model: af.ScGPT, task: Task, n: int, *, n_steps: int, seed: int) -> dict[str, Any]:
    """The setting of each method for `n` labelled cells, by macro-F1 at other cells of the pool: test cells stay unseen."""
    few = task.labelled(min(n, len(task.pool) * 3 // 4), seed)
    others = task.pool[~np.isin(task.pool, few)][:TEST]
    chosen = {}
    for name, (method, settings) in methods(model, task, n_steps=n_steps, seed=seed).items():
        chosen[name] = max(settings, key=lambda setting: macro_f1(task.labels[others], method(setting, few, 0, others), len(task.types)))
    return chosen


def macro_f1(truth: np.ndarray, said: np.ndarray, n_types: int) -> float:
    """Mean over the types that occur in `truth`."""
    hits = np.bincount(truth[truth == said], minlength=n_types)
    both = np.bincount(truth, minlength=n_types) + np.bincount(said, minlength=n_types)
    there = np.bincount(truth, minlength=n_types) > 0
    return float(np.mean(2 * hits[there] / both[there]))


def bootstrap(truth: np.ndarray, said: np.ndarray, n_types: int, *, seed: int) -> np.ndarray:
    """Draws of the macro-F1, mean over seeds; cells are drawn within their types, the same cells for every method."""
    rng = np.random.default_rng(seed)
    of_type = [np.flatnonzero(truth == code) for code in np.unique(truth)]
    drawn = [np.concatenate([rng.choice(cells, len(cells)) for cells in of_type]) for _ in range(N_DRAWS)]
    return np.array([np.mean([macro_f1(truth[rows], each[rows], n_types) for each in said]) for rows in drawn])


def score_set(
    model: af.ScGPT, task: Task, n: int, chosen: Mapping[str, Any], *, n_steps: int, n_seeds: int, seed: int
) -> tuple[list[dict[str, object]], dict[str, np.ndarray]]:
    """A row per method and seed, and each method's bootstrap draws."""
    truth, rows, draws = task.labels[task.test], [], {}
    for name, (method, _) in methods(model, task, n_steps=n_steps, seed=seed).items():
        said = np.stack([method(chosen[name], task.labelled(n, seed + of), of, task.test) for of in range(n_seeds)])
        draws[name] = bootstrap(truth, said, len(task.types), seed=seed)
        for of, each in enumerate(said):
            scores = {"macro_f1": macro_f1(truth, each, len(task.types)), "accuracy": float(np.mean(truth == each))}
            rows.append({"labelled": n, "method": name, "setting": chosen[name], "seed": seed + of, **scores})
    return rows, draws


def tables(
    model: af.ScGPT, sets: Mapping[str, Path], *, sizes: Sequence[int], n_steps: int, n_seeds: int, seed: int
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Tables by name, and what to say under them."""
    tasks = {name: read_task(read_cells(path, None, seed=seed, labelled=True), model, seed=seed) for name, path in sets.items()}
    first = next(iter(tasks))
    rows, differences, settings = [], [], []
    for n in sizes:
        chosen = choose(model, tasks[first], n, n_steps=n_steps, seed=seed)
        settings.append(f"{n}: " + ", ".join(f"{name} {setting}" for name, setting in chosen.items()))
        draws: dict[str, dict[str, np.ndarray]] = {}
        for name, task in tasks.items():
            found, draws[name] = score_set(model, task, n, chosen, n_steps=n_steps, n_seeds=n_seeds, seed=seed)
            rows += [{"set": name, "types": len(task.types), "test_cells": len(task.test), **row} for row in found]
        differences += _differences(pd.DataFrame(rows).query("labelled == @n"), draws, n, seed=seed)
    scores = pd.DataFrame(rows)
    mean = scores.pivot_table("macro_f1", ["labelled", "set", "types", "test_cells"], "method", sort=False).reset_index()
    notes = [
        f"Mean of {n_seeds} draws of the labelled cells; test cells (at most {TEST} a set) are never drawn. From scratch: the same network"
        " and training, random weights.",
        f"Fine-tuning of all weights: CLS objective, AdamW, {n_steps} steps of {CELLS_PER_STEP} cells with at most {MAX_LENGTH} tokens (of"
        f" test cells {MAX_LENGTH_TEST}), weight decay {WEIGHT_DECAY:g}, dropout {DROPOUT:g}, warm-up {WARM_UP:.0%}, then linear decay.",
        "Logistic regression: log-normalised expression of all genes of the set, scaled or not. Frozen: logistic regression on the cell"
        " states of the pretrained, or of a random network, which is not trained further.",
        f"Rate, inverse penalty and scaling, chosen on pool cells of {first} for all sets: {'; '.join(settings)}.",
        "Intervals: 95 %, bootstrap over test cells within their types; of the mean, over sets and cells.",
    ]
    return {"fewshot": mean, "fewshot_difference": pd.DataFrame(differences), "fewshot_all": scores}, notes


def _differences(scores: pd.DataFrame, draws: Mapping[str, Mapping[str, np.ndarray]], n: int, *, seed: int) -> list[dict[str, object]]:
    """Pretrained less each other method: a row per set, and one for their mean."""
    mean = scores.pivot_table("macro_f1", "set", "method", sort=False)
    rows: list[dict[str, object]] = [{"labelled": n, "set": name} for name in [*draws, "mean of sets"]]
    pairs = {"fine-tuned: less from scratch": (PRETRAINED, SCRATCH), "fine-tuned: less logistic": (PRETRAINED, LOGISTIC)}
    pairs |= {"frozen: less random": (FROZEN, FROZEN_RANDOM), "frozen: less logistic": (FROZEN, LOGISTIC)}
    for title, (ours, other) in pairs.items():
        each = {name: of[ours] - of[other] for name, of in draws.items()}
        found = [*(mean[ours] - mean[other]).loc[list(draws)], (mean[ours] - mean[other]).mean()]
        for row, value, drawn in zip(rows, found, [*each.values(), resampled_mean(each, seed=seed)], strict=True):
            low, high = interval(drawn)
            row[title] = f"{value:+.3f} ({low:+.3f} to {high:+.3f}) {verdict(low, high, even=0, less_is_better=False)}"
    return rows
