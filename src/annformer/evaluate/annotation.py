"""How well simple classifiers find the labels of held-out cells in a representation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from annformer.errors import input_error

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Inverse penalties of the logistic regression, chosen inside the training cells."""


def leave_out_annotation(
    representations: Mapping[str, Float[np.ndarray, "cell width"]],
    labels: Sequence[str] | np.ndarray,
    *,
    test_share: float = 0.3,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
) -> pd.DataFrame:
    """Hide the labels of some cells, learn the others, score the hidden ones; the same cells are hidden from every method.

    Parameters
    ----------
    representations
        Name of the method -> cells in rows, in one common order.
    labels
        One per cell.
    test_share
        Share of the cells of each label that is hidden.
    seeds
        One split each.

    Returns
    -------
    One row per (representation, classifier, seed) with `accuracy` and `macro_f1`; the representation of the majority class is "(none)".
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.metrics import accuracy_score, f1_score

    truth = np.asarray(labels, dtype=str)
    rows: list[dict[str, object]] = []
    runs = [(name, values, probe) for name, values in representations.items() for probe in PROBES]
    for seed in seeds:
        learnt, hidden = _split(truth, test_share, seed)
        for name, values, probe in [*runs, ("(none)", np.zeros((len(truth), 1)), "majority class")]:
            classifier = PROBES[probe](seed) if probe in PROBES else DummyClassifier(strategy="most_frequent")
            said = _predict(classifier, values[learnt], truth[learnt], values[hidden])
            scores = {
                "accuracy": accuracy_score(truth[hidden], said),
                "macro_f1": f1_score(truth[hidden], said, average="macro", zero_division=0),
            }
            rows.append({"representation": name, "classifier": probe, "seed": seed, **scores})
    return pd.DataFrame(rows)


def summarise(
    scores: pd.DataFrame, by: Sequence[str] = ("representation", "classifier"), values: Sequence[str] = ("accuracy", "macro_f1")
) -> pd.DataFrame:
    """Mean and standard deviation over the seeds: `<value>` and `<value>_sd`, groups in order of appearance."""
    groups = scores.groupby(list(by), sort=False)[list(values)]
    return groups.mean().join(groups.std(ddof=1).add_suffix("_sd")).reset_index()


def _split(truth: np.ndarray, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    names, counts = np.unique(truth, return_counts=True)
    if (counts < 2).any() or len(names) < 2:
        alone = ", ".join(map(str, names[counts < 2][:5])) or str(names[0])
        found = f"labels with too few cells to hold some out ({alone})"
        raise input_error(found, "at least two labels with two cells each", "merge or drop the rare labels")
    rows = np.arange(len(truth))
    learnt, hidden = train_test_split(rows, test_size=test_share, stratify=truth, random_state=seed)
    return learnt, hidden


def _predict(classifier: Any, known: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The least populated class", category=UserWarning
        )  # rare types: the inner folds do what they can
        warnings.filterwarnings("ignore", category=ConvergenceWarning)  # the weakest penalties of the grid need not converge to be judged
        return classifier.fit(known, labels).predict(asked)


def _nearest(seed: int) -> Any:  # noqa: ARG001  (neighbours draw nothing)
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(n_neighbors=10)


def _logistic(seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    grid = {"standardscaler": [StandardScaler(), FunctionTransformer(_one_scale)], "logisticregression__C": list(STRENGTHS)}
    return GridSearchCV(pipeline, grid, cv=StratifiedKFold(3, shuffle=True, random_state=seed))


def _one_scale(values: np.ndarray) -> np.ndarray:
    """Divide by one number, so that a penalty means the same for every representation without making all columns equal."""
    return (values - values.mean(axis=0)) / max(float(values.std()), 1e-12)


PROBES: dict[str, Callable[[int], Any]] = {"kNN (k=10)": _nearest, "logistic regression": _logistic}
"""Classifiers by name; each takes the seed of its inner folds."""
