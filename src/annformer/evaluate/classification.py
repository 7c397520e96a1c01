"""How well predicted cell types agree with the true ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from annformer.errors import input_error
from annformer.evaluate.contingency import contingency_table

Names = Sequence[object] | np.ndarray | pd.Series
"""A cell type for each cell: its name or its code."""

CLASSIFICATION_DEFINITIONS: dict[str, str] = {
    "accuracy": "share of the cells whose predicted type is the true one",
    "macro_f1": "mean over the types that occur in the truth of F1, the harmonic mean of precision and recall (0 where a type is never "
    "predicted rightly)",
    "macro_precision": "mean over the types that occur in the truth of the share of the cells predicted as it that are of it (0 where "
    "it is never predicted)",
    "macro_recall": "mean over the types that occur in the truth of the share of its cells that are predicted as it",
}
"""What each score is. All lie between 0 and 1, more is better.

A predicted type that does not occur in the truth, "unassigned" among them, costs the recall of the cells' true types and nothing else.
"""


def classification_scores(truth: Names, predicted: Names) -> dict[str, float]:
    """Score predictions with the scores of `CLASSIFICATION_DEFINITIONS`."""
    table = confusion(truth, predicted).to_numpy(dtype=np.float64)
    precision, recall, f1 = _by_type(table)
    return {
        "accuracy": float(np.trace(table) / table.sum()),
        "macro_f1": float(f1.mean()),
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
    }


def per_type_scores(truth: Names, predicted: Names) -> pd.DataFrame:
    """Score every type of the truth: `type`, `n` cells, `precision`, `recall`, `f1`."""
    table = confusion(truth, predicted)
    precision, recall, f1 = _by_type(table.to_numpy(dtype=np.float64))
    n = table.sum(axis=1).to_numpy()
    return pd.DataFrame({"type": table.index.to_numpy(), "n": n, "precision": precision, "recall": recall, "f1": f1})


def confusion(truth: Names, predicted: Names) -> pd.DataFrame:
    """Count the cells of every true type (rows) that are predicted as each type (columns: the same types, then those predicted only)."""
    true, said, names, n_true = _codes(truth, predicted)
    table = contingency_table(true, said, np.ones(len(true)), (n_true, len(names))).astype(np.int64)
    return pd.DataFrame(table, index=pd.Index(names[:n_true], name="truth"), columns=pd.Index(names, name="predicted"))


def macro_f1_on_draws(truth: Names, predicted: Names, draws: Iterable[Int[np.ndarray, "row"]]) -> Float[np.ndarray, "draw"]:
    """Macro-F1 of drawn cells, over the types that occur in the draw; microseconds for each thousand of them.

    Parameters
    ----------
    draws
        Rows of the cells that each draw takes, as often as it takes them; `annformer.evaluate.draws` gives them.
    """
    true, said, names, n_true = _codes(truth, predicted)
    n = len(names)
    pair = (true * n + said).astype(np.intp)
    tables = np.stack([np.bincount(pair[rows], minlength=n_true * n) for rows in draws]).reshape(-1, n_true, n)
    n_right = np.einsum("dii->di", tables[:, :, :n_true])
    n_true_cells, n_said_cells = tables.sum(axis=2), tables.sum(axis=1)[:, :n_true]
    f1 = 2 * n_right / np.maximum(n_true_cells + n_said_cells, 1)
    return np.where(n_true_cells > 0, f1, 0.0).sum(axis=1) / (n_true_cells > 0).sum(axis=1)


def _codes(truth: Names, predicted: Names) -> tuple[Int[np.ndarray, "cell"], Int[np.ndarray, "cell"], np.ndarray, int]:
    """Codes of both in one numbering, its names, and how many of them, the first, occur in the truth."""
    true, said = np.asarray(truth, dtype=object), np.asarray(predicted, dtype=object)
    assert len(true) == len(said), "truth and predictions have different numbers of cells"
    missing = int(pd.isna(true).sum() + pd.isna(said).sum())
    if missing or not len(true):
        found = f"{missing} of {2 * len(true)} true and predicted types are missing" if missing else "no cell to score"
        raise input_error(found, "a true and a predicted type for every cell", "leave cells without a type out; call the others something")
    types = np.unique(true)
    names = np.concatenate([types, np.setdiff1d(said, types)])
    index = pd.Index(names)
    return index.get_indexer(pd.Index(true)), index.get_indexer(pd.Index(said)), names, len(types)


def _by_type(table: Float[np.ndarray, "true predicted"]) -> tuple[Float[np.ndarray, "true"], ...]:
    """Precision, recall and F1 of every true type."""
    right, n_true, n_said = np.diag(table), table.sum(axis=1), table.sum(axis=0)[: len(table)]
    return right / np.maximum(n_said, 1), right / n_true, 2 * right / (n_true + n_said)
