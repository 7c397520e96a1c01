"""An answer as columns of obs."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from annformer.errors import input_error
from annformer.tasks._classifier import Answer
from annformer.tasks._votes import UNASSIGNED


def columns_of(
    answer: Answer,
    sets: Bool[np.ndarray, "cell type"],
    types: tuple[str, ...],
    *,
    unassigned_above: float | None,
    clusters: Int[np.ndarray, "cell"] | None,
) -> pd.DataFrame:
    """One row per cell; the names of the columns are what comes behind the key."""
    names = np.array([*types, UNASSIGNED], dtype=object)
    novel = answer.empty if unassigned_above is None else answer.empty | (answer.novelty > unassigned_above)
    codes = np.where(novel, len(types), answer.codes)
    rows, sets = np.arange(len(codes)), never_empty(sets, answer) & ~answer.empty[:, None]  # of a cell without genes nothing is known
    table = pd.DataFrame({"": pd.Categorical(names[codes], categories=_in_use(names, codes))})
    confidence = np.exp(answer.log_probabilities[rows, answer.codes])
    table["_confidence"] = np.where(answer.empty, np.nan, confidence).astype(np.float32)
    table["_novelty"] = answer.novelty.astype(np.float32)
    table["_set"] = pd.Categorical([" | ".join(names[:-1][members]) for members in sets])
    for part, by_part in answer.parts.items():
        called = np.where(answer.empty, len(types), by_part)
        table[f"_by_{part}"] = pd.Categorical(names[called], categories=_in_use(names, called))
    if clusters is not None:
        votes = np.zeros((clusters.max() + 1, len(names)))
        np.add.at(votes, (clusters, codes), 1)
        majority = votes.argmax(axis=1)[clusters]
        table["_majority"] = pd.Categorical(names[majority], categories=_in_use(names, majority))
    return table


def never_empty(sets: Bool[np.ndarray, "cell type"], answer: Answer) -> Bool[np.ndarray, "cell type"]:
    """The same sets, the type that is called in those that were empty."""
    empty = ~sets.any(axis=1)
    filled = sets.copy()
    filled[empty, answer.codes[empty]] = True
    return filled


def _in_use(names: np.ndarray, codes: Int[np.ndarray, "cell"]) -> list[str]:
    return [str(names[code]) for code in np.unique(codes)]


def require_shares(coverage: float, unassigned_above: float | None) -> None:
    """Refuse, before any work, what is no share."""
    require_coverage(coverage)
    if unassigned_above is not None and not 0 <= unassigned_above <= 1:
        found = f"unassigned_above={unassigned_above}"
        raise input_error(found, "a share from 0 to 1, such as 0.99", "choose another (--unassigned_above); 1 gives every cell a type")


def require_coverage(coverage: float) -> None:
    """Refuse what is no share."""
    if not 0 < coverage < 1:
        found = f"coverage={coverage}"
        raise input_error(found, "a share between 0 and 1, such as 0.9", "choose another coverage (--coverage)")
