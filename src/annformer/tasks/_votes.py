"""From neighbours to labels: how they vote, how near they are, and how unusual that is."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int

from annformer.tasks._index import ReferenceIndex, distances
from annformer.tasks._search import Nearest

log = logging.getLogger(__name__)

UNASSIGNED = "unassigned"
"""Label of cells that get none of the reference."""
CELLS_AT_ONCE = 1_024


def vote(
    codes: Int[np.ndarray, "query neighbour"], similarities: Float32[np.ndarray, "query neighbour"], n_classes: int
) -> tuple[Int[np.ndarray, "query"], Float32[np.ndarray, "query"]]:
    """Class that most neighbours have, and their share; of classes with as many votes, that of the nearer neighbours."""
    n_queries, k = codes.shape
    winners, share = np.empty(n_queries, np.int64), np.empty(n_queries, np.float32)
    for begin in range(0, n_queries, CELLS_AT_ONCE):
        part = slice(begin, begin + CELLS_AT_ONCE)
        n = len(codes[part])
        place = (np.arange(n)[:, None] * n_classes + codes[part]).reshape(-1)
        votes = np.bincount(place, minlength=n * n_classes).reshape(n, n_classes)
        near = np.bincount(place, weights=similarities[part].reshape(-1), minlength=n * n_classes).reshape(n, n_classes)
        winners[part] = (votes * (2 * k + 1) + near).argmax(axis=1)  # similarities of k neighbours add up to no more than k
        share[part] = votes[np.arange(n), winners[part]] / k
    return winners, share


def predictions(index: ReferenceIndex, found: Nearest, there: Int[np.ndarray, "query"], n_cells: int, limit: float | None) -> pd.DataFrame:
    """Label, share, distance and novelty of every cell; the columns are named by how their names end.

    Parameters
    ----------
    there
        Cells that were compared, in the order of `found`; the others get no label and no numbers.
    limit
        Novelty above which a cell gets no label; None: there is none.
    """
    codes, share = vote(index.codes[found.rows], found.similarities, len(index.classes))
    far = distances(found.similarities).mean(axis=1)
    novelty = index.percentile(far)
    if limit is not None:
        codes[above := novelty > limit] = len(index.classes)
        if 2 * above.sum() > len(above):
            said = "%s of %s cells have a novelty above %g and get no label: those of other studies lie further away, of known types too"
            log.warning(said, f"{int(above.sum()):,}", f"{len(above):,}", limit)
    whole = np.full(n_cells, len(index.classes))
    whole[there] = codes
    label = pd.Categorical.from_codes(whole, pd.Index([*index.classes, UNASSIGNED])).remove_unused_categories()
    table = pd.DataFrame({"": label})
    for name, values in (("_share", share), ("_distance", far), ("_novelty", novelty)):
        column = np.full(n_cells, np.nan, np.float32)
        column[there] = values
        table[name] = column
    return table
