"""Cells of a source, held against an index: how it grows by them, and which of its cells are nearest to them."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from annformer.data.anndata import AnnDataSource
from annformer.durations import in_words
from annformer.errors import AnnformerWarning, input_error
from annformer.tasks._encoding import embeddings, matched, progress_bar
from annformer.tasks._given import Cells, Chosen, given_embedding
from annformer.tasks._index import ReferenceIndex, Study
from annformer.tasks._mapping_cells import labelled, looked_at, require_genes, require_new
from annformer.tasks._search import Nearest, seconds_to_compare
from annformer.tasks._votes import UNASSIGNED

log = logging.getLogger(__name__)

ESTIMATED_ABOVE = 200_000_000
"""Pairs of cells from which on a few are compared first, to say how long all will take."""


class Found(NamedTuple):
    """What `nearest_to` finds."""

    nearest: Nearest
    there: Int[np.ndarray, "compared"]
    """Which cells have an embedding and were compared."""
    n_cells: int


def grown(index: ReferenceIndex, cells: Cells) -> ReferenceIndex:
    """Return the index with the labelled ones of `cells` as well."""
    source = cells.source
    rows, labels = labelled(source, index.settings.label_key)
    match = matched(source, cells.model)
    if index.n_cells:
        require_genes(index.genes, match, source.name)
    looked = looked_at(Chosen(source, rows), cells.model.vocab, index.keys)
    name = Path(source.name).name if source.container.on_disk else "AnnData"
    require_new(looked, name)
    rows, labels, keys = (values[~looked.known] for values in (rows, labels, looked.keys))
    vectors = _vectors(index, cells, Chosen(source, rows), rows)
    there = np.isfinite(vectors[:, 0])
    n_there = int(there.sum())
    if index.n_cells + n_there <= index.settings.n_neighbours:
        found = f"{n_there:,} labelled cells for {index.settings.n_neighbours} neighbours"
        raise input_error(found, "more cells than neighbours", "give a larger reference, or fewer neighbours (n_neighbours)")
    if n_there < len(rows):
        msg = f"{len(rows) - n_there:,} cells express no gene that the model knows: they are left out"
        warnings.warn(msg, AnnformerWarning, stacklevel=3)
    study = Study(name=name, n_cells=n_there, n_left_out=source.n_obs - n_there)
    kept = vectors if n_there == len(vectors) else vectors[there]  # no second copy of what may be large
    larger = index.with_cells(kept, source.obs_names[rows][there], labels[there], keys[there], looked.genes, study)
    if len(larger.classes) == 1:
        only = f"the reference has one label only, {larger.classes[0]!r}"
        msg = f"{only}: every cell will get it; distance and novelty still tell cells apart"
        warnings.warn(msg, AnnformerWarning, stacklevel=3)
    if index.n_cells and (fresh := larger.classes[len(index.classes) :]):
        log.info("labels that the reference did not have: %s", ", ".join(map(repr, fresh[:8])) + (", ..." if len(fresh) > 8 else ""))
    log.info("%s cells of %d types in the reference", f"{larger.n_cells:,}", len(larger.classes))
    return larger


def nearest_to(index: ReferenceIndex, cells: Cells) -> Found:
    """Find the neighbours in the index of all `cells` that have an embedding.

    Raises
    ------
    InputError
        When they lack most of what the reference expresses, or were embedded in another way.
    """
    require_genes(index.genes, matched(cells.source, cells.model), cells.source.name)
    vectors = _vectors(index, cells, cells.source)
    there = np.flatnonzero(np.isfinite(vectors[:, 0]))
    if n_empty := len(vectors) - len(there):
        msg = f"{n_empty:,} cells express no gene that the model knows: they are {UNASSIGNED!r}"
        warnings.warn(msg, AnnformerWarning, stacklevel=4)
    queries, n = vectors[there] if n_empty else vectors, index.settings.n_neighbours
    if index.lists is not None:
        return Found(index.nearest(queries, n), there, len(vectors))
    if len(queries) * index.n_cells > ESTIMATED_ABOVE:
        taken = seconds_to_compare(queries, index.parts, n)
        shorter = '; shorter with a reference fitted with search="faiss" (--search faiss)' if taken > 60 else ""
        log.info("%s cells against %s: about %s%s", f"{len(queries):,}", f"{index.n_cells:,}", in_words(taken), shorter)
    with progress_bar(index.n_cells, 0, progress=cells.progress, what="comparing") as advance:
        return Found(index.nearest(queries, n, advance=advance), there, len(vectors))


def _vectors(
    index: ReferenceIndex, cells: Cells, source: AnnDataSource | Chosen, rows: Int[np.ndarray, "cell"] | slice = slice(None)
) -> Float32[np.ndarray, "cell width"]:
    """Embedding of the cells of `source`, which are `rows` of `cells`."""
    if cells.embedding is not None:
        return given_embedding(cells.data, cells.embedding, index.settings)[rows]
    result = np.empty((source.n_obs, cells.model.config.model.width), np.float32)
    done = 0
    for run in embeddings(cells.model, source, index.settings.tokenizer, progress=cells.progress):
        result[done : done + len(run)] = run
        done += len(run)
    return result
