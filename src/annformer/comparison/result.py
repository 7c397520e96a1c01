"""Comparison: all that one comparison found out, as tables and arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from annformer.comparison.verdicts import VERDICTS


@dataclass(frozen=True)
class Facts:
    """What a comparison was made of."""

    cells: Mapping[str, object]
    """Data card: what -> value."""
    cells_by: pd.DataFrame
    """Number of cells by type (rows) and batch (columns)."""
    genes: Sequence[str]
    """The gene match in sentences."""
    model: Mapping[str, object]
    card: str
    """First paragraph of the model card, "" where the model has none."""
    command: str
    """What makes the same comparison again."""
    versions: Mapping[str, object]
    definitions: Mapping[str, str]
    """Score -> what it is."""
    skipped: Mapping[str, str]
    """Method that was not run -> why."""
    recipe: str = ""
    """Settings by which ours learned, as YAML; "" where it did not."""


@dataclass(frozen=True)
class Maps:
    """Two-dimensional maps of the same cells by every method."""

    rows: Int[np.ndarray, "drawn"]
    """Cells that are drawn."""
    by_method: Mapping[str, Float[np.ndarray, "drawn 2"]]
    columns: pd.DataFrame
    """What may colour the drawn cells; the first two are batch and type."""


@dataclass(frozen=True)
class Comparison:
    """Methods side by side on the same cells."""

    task: str
    ours: str
    """The method that the verdicts are about."""
    scores: pd.DataFrame
    """One row per method and seed: method, kind (ours, floor, control), seed, seconds, memory_mb, and every score."""
    verdicts: pd.DataFrame
    """One row per score and other method: score, ours, other, kind, best_floor, value, other_value, difference, low, high, verdict."""
    unit: str
    """What the bootstrap drew: batches, or cells within their type."""
    n_units: int | None
    """Batches that were drawn, None where it were cells."""
    n_draws: int
    n_left_out: int
    """Draws without a cell that a score needs: no verdict rests on them."""
    per_label: pd.DataFrame
    """One row per method and type, averaged over seeds."""
    embeddings: Mapping[str, Float[np.ndarray, "cell width"]]
    """Method -> its embedding with the first seed; NaN for cells that the comparison left out."""
    maps: Maps
    history: pd.DataFrame
    """Losses of what was trained: method, seed, step, train/..., validation/..."""
    facts: Facts
    sentence: str
    """Whether to trust it."""
    notes: Sequence[str] = ()
    """What else the verdicts say, a sentence each."""
    judged: Sequence[str] = VERDICTS
    """The scores that get verdicts, the one that decides first."""
    more_tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Further files that the task has, or other contents for the usual ones."""

    def means(self) -> pd.DataFrame:
        """Scores and seconds by method, averaged over its seeds, and its most memory; the best by the score that decides first."""
        numbers = self.scores.drop(columns=["seed"])
        groups = numbers.groupby(["method", "kind"], sort=False)
        most = groups["memory_mb"].max()  # not the mean: later seeds use the memory of the first again
        table = groups.mean(numeric_only=True).assign(memory_mb=most).reset_index()
        table.insert(2, "seeds", numbers.groupby("method", sort=False).size().to_numpy())
        return table.sort_values(self.judged[0], ascending=False, kind="stable", ignore_index=True)
