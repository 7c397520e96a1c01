"""AnnotationComparison: what a comparison of annotation found out beyond scores and verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from annformer.comparison.result import Comparison
from annformer.evaluate.calibration import Interval


@dataclass(frozen=True, kw_only=True)
class AnnotationComparison(Comparison):
    """Callers of types side by side on the same folds; `scores` and verdicts are those of the split that is harder."""

    split: str
    """How cells were held out for scores and verdicts."""
    folds: pd.DataFrame
    """One row per fold of that split: held out, cells, types, cells of types that are not among those learned from."""
    n_unseen: int
    """Cells whose type nobody could learn when they were held out."""
    beside: pd.DataFrame
    """One row per method and split: method, kind, split, and the scores, averaged over seeds."""
    confusions: Mapping[str, pd.DataFrame]
    """Ours and the best floor -> cells by true type (rows) and called type (columns), with the first seed."""
    reliability: Mapping[str, pd.DataFrame]
    """Method -> confidence and share of right calls, by bins."""
    error: Interval | None
    """Calibration error of ours on the bootstrap draws; None where it does not say how sure it is."""
    calibrated: Interval | None
    """Calibration error that right confidences of ours would show."""
    coverage: pd.DataFrame
    """Sets of types of ours, a row per split; empty where it has none."""
    novelty: pd.DataFrame
    """How well cells of a type stand out that was left out of what is learned from: label, method, n, auroc, low, high."""
    novelty_mean: pd.DataFrame
    """The mean of that over the types, `n` of them, by method."""
