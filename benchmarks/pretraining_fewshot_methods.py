"""Ways to learn cell types from a few labelled cells: fine-tuning, logistic regression, frozen networks (part of pretraining.py)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import scanpy as sc
import torch
from anndata import AnnData
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

import annformer as af
from annformer.objectives.cls import CLS
from annformer.scgpt import ModelFolderConfig
from annformer.tokenizer import TokenizerSettings, tokenize
from annformer.tokens import CellBatch, TokenBatch
from pretraining_cells import LABEL_KEY, one_thread, whole
from pretraining_clusters import log_normalised, random_network

PRETRAINED, SCRATCH = "pretrained", "from scratch"
LOGISTIC, LOGISTIC_VARIABLE = "logistic regression", "logistic regression, HVG"
FROZEN, FROZEN_RANDOM = "pretrained, frozen", "random, frozen"
MAX_LENGTH = 64
"""Tokens of a cell in a training step, drawn anew in each."""
MAX_LENGTH_TEST = 300
CELLS_PER_STEP = 8
WARM_UP = 0.1
DROPOUT = 0.0
WEIGHT_DECAY = 0.01
TUNING = tuple(
    f"rate {rate:g}, {n_steps} steps{head}" for n_steps, head in ((80, ""), (240, ""), (240, ", one rate")) for rate in (3e-4, 1e-3)
)
"""Learning rates and numbers of steps; the same for the pretrained model and from scratch. The head, which is new in both, learns at
`HEAD_RATE` times the rate, but for *one rate*."""
HEAD_RATE = 10
STRENGTHS = tuple(f"C {strength:g}{scaled}" for scaled in ("", ", scaled") for strength in (0.01, 0.1, 1, 10, 100, 1000))
"""Inverse penalties of the logistic regression; with or without dividing each input by its deviation."""
N_VARIABLE = 2_000
POOL, TEST = 1_200, 300
MIN_CELLS = 10
"""Of a type; rarer ones are left out."""


class Task(NamedTuple):
    """A labelled set, cut once into a pool that labelled cells are drawn from and test cells."""

    cells: CellBatch
    """Counts of the highly variable genes, which saw all cells and no label."""
    expression: AnnData
    """Log-normalised, all genes, with `highly_variable`."""
    tokens: np.ndarray
    """Ids of all tokens that occur, in order; the others need no row in a network that is fine-tuned."""
    labels: np.ndarray
    types: tuple[str, ...]
    pool: np.ndarray
    test: np.ndarray

    def labelled(self, n: int, seed: int) -> np.ndarray:
        """`n` cells of the pool, of every type one at least where there are as many places; more cells hold the fewer."""
        order = np.random.default_rng(seed).permutation(self.pool)
        _, first = np.unique(self.labels[order], return_index=True)
        return np.concatenate([order[first], np.delete(order, first)])[:n]


def read_task(adata: AnnData, model: af.ScGPT, *, seed: int) -> Task:
    """Cut a set: as many as `TEST` cells, or a quarter where that is less, are for tests."""
    names = adata.obs[LABEL_KEY].astype(str)
    adata = adata[names.isin(names.value_counts().loc[lambda n: n >= MIN_CELLS].index)].copy()
    types, labels = np.unique(adata.obs[LABEL_KEY].astype(str), return_inverse=True)
    expression = log_normalised(adata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scanpy and pandas, on small sets
        sc.pp.highly_variable_genes(expression, n_top_genes=min(N_VARIABLE, expression.n_vars))
    order = np.random.default_rng(seed).permutation(adata.n_obs)
    n_pool = min(POOL, max(adata.n_obs * 3 // 4, adata.n_obs - TEST))
    variable = adata[:, expression.var_names[expression.var["highly_variable"]]].copy()
    cells = whole(variable, model)
    ids = np.unique(np.append(cells.gene_ids, model.vocab.cls_id))
    return Task(cells, expression, ids, labels, tuple(types), order[:n_pool], order[n_pool:][:TEST])


class Methods:
    """Every method on one set; what does not depend on the labelled cells is computed when it is first asked for."""

    def __init__(self, model: af.ScGPT, task: Task, *, n_random: int, seed: int) -> None:
        self.model, self.task, self.seed = model, task, seed
        self.networks = {FROZEN: model} | {f"{FROZEN_RANDOM} #{of}": random_network(model, seed + of) for of in range(n_random)}
        logistic = (LOGISTIC, LOGISTIC_VARIABLE, *self.networks)
        self.settings: dict[str, tuple[str, ...]] = dict.fromkeys((PRETRAINED, SCRATCH), TUNING) | dict.fromkeys(logistic, STRENGTHS)
        self._features: dict[str, np.ndarray] = {}

    def predict(self, name: str, setting: str, rows: Int[np.ndarray, "labelled"], seed: int) -> Int[np.ndarray, "test"]:
        """Learn from the cells `rows` and give the types of the test cells as codes."""
        asked = self.task.test
        if name in (PRETRAINED, SCRATCH):
            _, rate, n_steps, *_ = setting.replace(",", "").split()
            start = self.model if name == PRETRAINED else random_network(self.model, self.seed + seed)
            tuned = fine_tune(
                start, self.task, rows, rate=float(rate), n_steps=int(n_steps), one_rate="one rate" in setting, seed=self.seed + seed
            )
            return predict(tuned, self.task, asked)
        features = self._of(name)
        return logistic(features[rows], self.task.labels[rows], features[asked], setting)

    def _of(self, name: str) -> np.ndarray:
        if name not in self._features:
            expression = self.task.expression
            if name in self.networks:
                self._features[name] = states(self.networks[name], self.task)
            else:
                some = expression[:, expression.var["highly_variable"]] if name == LOGISTIC_VARIABLE else expression
                self._features[name] = some.X.toarray()
        return self._features[name]


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


def of_task(tokens: TokenBatch, task: Task) -> TokenBatch:
    """The same tokens for a network that has the rows of `task.tokens` only."""
    return tokens._replace(gene_ids=torch.from_numpy(np.searchsorted(task.tokens, tokens.gene_ids.numpy())))


def fine_tune(model: af.ScGPT, task: Task, rows: np.ndarray, *, rate: float, n_steps: int, one_rate: bool, seed: int) -> af.ScGPT:
    """AdamW, warm-up and linear decay, cells drawn in seeded passes; whatever part of a long cell is read differs from step to step."""
    one_thread()
    tuned = with_classifier(model, len(task.types), seed=seed).train()
    tuned.encoder.gene = torch.nn.Embedding.from_pretrained(tuned.encoder.gene.weight[task.tokens].detach(), freeze=False)
    parts = [(tuned.encoder.parameters(), rate), (tuned.objectives.parameters(), rate if one_rate else rate * HEAD_RATE)]
    groups = [{"params": list(parameters), "lr": peak, "peak": peak} for parameters, peak in parts]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    short = tuned.tokenizer.with_(max_length=min(MAX_LENGTH, tuned.tokenizer.max_length))
    passes = -(-n_steps * CELLS_PER_STEP // len(rows))
    order = np.concatenate([np.random.default_rng([seed, number]).permutation(rows) for number in range(passes)])
    with without_denormals():
        for step in range(n_steps):
            done = (step + 1) / n_steps
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(done / WARM_UP, (1 - done) / (1 - WARM_UP) + 1 / n_steps)
            tokens = tokens_of(task, tuned, order[step * CELLS_PER_STEP : (step + 1) * CELLS_PER_STEP], short, step=step)
            tuned.losses(of_task(tokens, task))["cls"].mean.backward()
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return tuned.eval()


@contextmanager
def without_denormals() -> Iterator[None]:
    """Moments of gradients that fade away slow the processor down; the switch is the whole process's, so it is put back."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def states(model: af.ScGPT, task: Task) -> Float[np.ndarray, "cell width"]:
    """Cell states of pool and test cells; cells that are neither stay zero."""
    one_thread()
    rows = np.concatenate([task.pool, task.test])
    found = np.zeros((len(task.labels), model.config.model.width), dtype=np.float32)
    with torch.inference_mode():
        for some, tokens in _batches(model, task, rows):
            found[some] = model.encode(tokens, "cell").cell.numpy()
    return found


def predict(model: af.ScGPT, task: Task, rows: np.ndarray) -> np.ndarray:
    """Codes of the types that a fine-tuned network gives."""
    head = model.objectives["cls"]
    assert isinstance(head, CLS)
    with torch.inference_mode():
        parts = [head.predict(model.encode(of_task(tokens, task), "cell")).argmax(1).numpy() for _, tokens in _batches(model, task, rows)]
    return np.concatenate(parts)


def _batches(model: af.ScGPT, task: Task, rows: np.ndarray) -> Iterable[tuple[np.ndarray, TokenBatch]]:
    settings = model.tokenizer.with_(max_length=min(MAX_LENGTH_TEST, model.tokenizer.max_length))
    for first in range(0, len(rows), 8):
        some = rows[first : first + 8]
        yield some, tokens_of(task, model, some, settings)


def logistic(
    known: Float[np.ndarray, "labelled input"], labels: Int[np.ndarray, "labelled"], asked: Float[np.ndarray, "test input"], setting: str
) -> Int[np.ndarray, "test"]:
    """Codes that a multinomial logistic regression gives; inputs are centred, and scaled where the setting says so."""
    strength, _, scaled = setting.removeprefix("C ").partition(", ")
    mean, deviation = known.mean(axis=0), known.std(axis=0) if scaled else np.ones(known.shape[1], known.dtype)
    known, asked = ((each - mean) / np.where(deviation > 0, deviation, 1) for each in (known, asked))
    classifier = LogisticRegression(C=float(strength), max_iter=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the weakest penalties need not converge to be judged
        known, asked = rotated(known, asked)
        return classifier.fit(known, labels).predict(asked)


def rotated(known: Float[np.ndarray, "labelled input"], asked: Float[np.ndarray, "test input"]) -> tuple[np.ndarray, np.ndarray]:
    """Both in the directions that the known cells span: weights under a penalty on their square have no other, and there are far fewer."""
    if known.shape[0] >= known.shape[1]:
        return known, asked
    values, vectors = np.linalg.eigh((known @ known.T).astype(np.float64))
    some = values > 1e-6 * values[-1]
    values, vectors = np.sqrt(values[some]), vectors[:, some]
    return vectors * values, (asked @ known.T).astype(np.float64) @ (vectors / values)
