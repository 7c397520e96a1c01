"""ReferenceMapper: cells named after their nearest neighbours in an embedded reference."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Float32

import annformer
from annformer.data.anndata import AnnDataSource
from annformer.data.write import require_place
from annformer.data.write_columns import write_with_columns
from annformer.errors import input_error
from annformer.scgpt import DEFAULT_MODEL, ScGPT
from annformer.tasks._encoding import loaded
from annformer.tasks._given import Cells, How
from annformer.tasks._index import MODEL, IndexSettings, ReferenceIndex, distances, new_index
from annformer.tasks._output import Output
from annformer.tasks._place import check_key, check_target, put_columns
from annformer.tasks._reference import grown, nearest_to
from annformer.tasks._threads import torch_threads
from annformer.tasks._votes import predictions

TASK = "mapping"


class Neighbours(NamedTuple):
    """The nearest cells of a reference, the nearest first; cells without any expressed gene that the model knows have none (NaN)."""

    names: np.ndarray
    """Cell x neighbour."""
    distances: Float32[np.ndarray, "cell neighbour"]
    """Cosine distances."""


class ReferenceMapper:
    """Name cells after the most similar cells of a labelled reference, and say how far away these are.

    Parameters
    ----------
    model
        A loaded model, a model folder, or the name of a checkpoint. It is kept with the index: every query is embedded by it.
    label_key
        Column of obs of the reference with the label of every cell. Cells without one ("unlabelled", "unknown", nothing) are left out.
    n_neighbours
        Neighbours that vote.
    search
        "exact" compares with every cell of the reference. "faiss" (extra `atlas`) looks at those that are likely: for references of
        hundreds of thousands of cells.
    layer, gene_key
        Where counts and gene names are, if not where `AnnDataSource` finds them.
    device
        Such as "cuda"; None: where the model is.
    threads
        Of the CPU; None: as torch is set.

    Attributes
    ----------
    model_
        The model.
    classes_
        The labels of the reference.
    n_cells_
        Cells of the reference.
    seconds_
        What `fit` or the last `add` took.
    """

    def __init__(
        self,
        model: ScGPT | str | Path = DEFAULT_MODEL,
        *,
        label_key: str,
        n_neighbours: int = 15,
        search: Literal["exact", "faiss"] = "exact",
        layer: str | None = None,
        gene_key: str | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.model, self.label_key, self.n_neighbours, self.search = model, label_key, n_neighbours, search
        self.layer, self.gene_key, self.device, self.threads = layer, gene_key, device, threads

    def fit(self, adata: AnnData | str | Path, *, embedding: str | None = None, progress: bool | None = None) -> Self:
        """Embed the labelled cells of a reference.

        Parameters
        ----------
        adata
            Cells with counts and labels, or the path of their file, which is read in bounded memory.
        embedding
            Name in obsm of an embedding that `embed` wrote by the same model, to use instead of embedding again.
        progress
            Show a progress bar; None: when stderr is a terminal.

        Raises
        ------
        InputError
            When the column of labels is not there or holds no labels, or there are fewer cells than neighbours.
        """
        _require_options(self.n_neighbours, self.search)
        self.model_ = loaded(self.model, self.device)
        settings = IndexSettings(
            model=self.model_.name,
            fingerprint=self.model_.fingerprint,
            tokenizer=self.model_.tokenizer,
            label_key=self.label_key,
            n_neighbours=self.n_neighbours,
            search=self.search,
            version=annformer.__version__,
            studies=(),
        )
        self._grow(new_index(settings, self.model_.config.model.width), adata, {"embedding": embedding, "progress": progress})
        return self

    def add(self, adata: AnnData | str | Path, *, embedding: str | None = None, progress: bool | None = None) -> Self:
        """Add the labelled cells of another study to a fitted reference; parameters and errors are those of `fit`.

        Their genes are held against those of the reference, as a query's are.
        """
        self._require_fitted()
        self._grow(self._index, adata, {"embedding": embedding, "progress": progress})
        return self

    @property
    def classes_(self) -> tuple[str, ...]:
        """The labels of the reference."""
        self._require_fitted()
        return self._index.classes

    @property
    def n_cells_(self) -> int:
        """Cells of the reference."""
        self._require_fitted()
        return self._index.n_cells

    def neighbours(self, adata: AnnData | str | Path, *, embedding: str | None = None, progress: bool | None = None) -> Neighbours:
        """Names of the nearest cells of the reference, and their distances; parameters and errors are those of `predict`."""
        self._require_fitted()
        with self._cells(adata, {"embedding": embedding, "progress": progress}) as cells:
            found, there, n_cells = nearest_to(self._index, cells)
        names = np.full((n_cells, found.rows.shape[1]), np.nan, object)
        names[there] = self._index.names.take(found.rows.reshape(-1)).to_numpy().reshape(found.rows.shape)
        far = np.full(names.shape, np.nan, np.float32)
        far[there] = distances(found.similarities)
        return Neighbours(names, far)

    def predict(
        self,
        adata: AnnData,
        *,
        key_added: str = "mapped_cell_type",
        unassigned_above: float | None = None,
        embedding: str | None = None,
        progress: bool | None = None,
        copy: bool = False,
    ) -> AnnData | None:
        """Write the label that most neighbours have into `obs[key_added]`; of labels with as many votes, that of the nearer neighbours.

        Beside it stand `<key_added>_share` (of the neighbours with this label), `<key_added>_distance` (mean cosine distance to the
        neighbours) and `<key_added>_novelty`: the share of the reference whose cells lie nearer to their own neighbours.

        Parameters
        ----------
        unassigned_above
            Novelty above which a cell gets no label but "unassigned"; None: every cell gets a label, except those without any expressed
            gene that the model knows.
        embedding
            Name in obsm of an embedding that `embed` wrote by the model of the reference, to use instead of embedding again.
        copy
            Return a copy with the result instead of writing into `adata`.

        Raises
        ------
        InputError
            When the query lacks most of what the reference expresses, or was embedded by another model.
        """
        self._require_fitted()
        check_key(key_added)
        check_target(adata, copy=copy)
        _require_share(unassigned_above)
        with self._cells(adata, {"embedding": embedding, "progress": progress}) as cells:
            found = nearest_to(self._index, cells)
        table = predictions(self._index, *found, unassigned_above).add_prefix(key_added)
        target = put_columns(adata, key_added, table, self._record(unassigned_above), copy=copy)
        return target if copy else None

    def predict_file(
        self,
        path_in: str | Path,
        path_out: str | Path,
        *,
        key_added: str = "mapped_cell_type",
        unassigned_above: float | None = None,
        embedding: str | None = None,
        progress: bool | None = None,
        overwrite: bool = False,
    ) -> pd.DataFrame:
        """Write a copy of a file with the columns of `predict`, in memory that grows with the embedding of its cells only.

        Parameters
        ----------
        path_in
            h5ad, zarr, 10x `.h5` or mtx folder.
        path_out
            Ends in `.h5ad` or `.zarr`; it appears whole or not at all.
        overwrite
            Replace `path_out` when it exists, at the end.

        Returns
        -------
        The columns. Other parameters are those of `predict`.
        """
        self._require_fitted()
        check_key(key_added)
        _require_share(unassigned_above)
        how: How = {"embedding": embedding, "progress": progress}
        with Output(Path(path_in), Path(path_out), overwrite=overwrite) as output, self._cells(output.path_in, how) as cells:
            require_place(cells.source.container, output.path_in)
            found = nearest_to(self._index, cells)
            table = predictions(self._index, *found, unassigned_above).add_prefix(key_added)
            write_with_columns(
                cells.source.container, output.path_in, output.result, table, key=key_added, record=self._record(unassigned_above)
            )
            output.publish()
            return table.set_index(pd.Index(cells.source.obs_names))

    def save(self, folder: str | Path) -> None:
        """Write index and model as a folder, whole or not at all; an index that stands there is replaced."""
        self._require_fitted()
        self._index.save(Path(folder), self.model_)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> Self:
        """Open what `save` wrote; the vectors stay on the disk.

        Parameters
        ----------
        layer, gene_key
            Where counts and gene names of the queries are, if not where `AnnDataSource` finds them.

        Raises
        ------
        InputError
            When there is no index, or its files are not those that were written.
        """
        index = ReferenceIndex.open(Path(folder))
        model = loaded(Path(folder) / MODEL, device)
        settings = index.settings
        if model.fingerprint != settings.fingerprint:
            found = f"the model in {Path(folder) / MODEL} is not the one by which the reference was embedded, {settings.model}"
            raise input_error(found, "the folder as it was written", "copy the folder again, or fit the reference again")
        mapper = cls(
            model,
            label_key=settings.label_key,
            n_neighbours=settings.n_neighbours,
            search=settings.search,
            layer=layer,
            gene_key=gene_key,
            device=device,
            threads=threads,
        )
        mapper.model_, mapper._index = model, index
        return mapper

    def _grow(self, index: ReferenceIndex, adata: AnnData | str | Path, how: How) -> None:
        began = time.monotonic()
        with self._cells(adata, how) as cells:
            self._index = grown(index, cells)
        self.seconds_ = time.monotonic() - began

    @contextmanager
    def _cells(self, adata: AnnData | str | Path, how: How) -> Iterator[Cells]:
        with AnnDataSource(adata, gene_key=self.gene_key, layer=self.layer) as source, torch_threads(self.threads):
            yield Cells(adata, source, self.model_, **how)

    def _record(self, unassigned_above: float | None) -> dict[str, Any]:
        """For `uns`: how the columns came about, in values that h5ad and zarr hold."""
        settings = self._index.settings
        return {
            "model": settings.model,
            "fingerprint": settings.fingerprint,
            "task": TASK,
            "label_key": settings.label_key,
            "n_neighbours": settings.n_neighbours,
            "search": settings.search,
            "n_cells": self._index.n_cells,
            "version": annformer.__version__,
            **({} if unassigned_above is None else {"unassigned_above": unassigned_above}),
        }

    def _require_fitted(self) -> None:
        if not hasattr(self, "_index"):
            found = "a ReferenceMapper that was not fitted"
            raise input_error(found, "a fitted one", "call fit(adata) first, or ReferenceMapper.load(folder)")


def _require_options(n_neighbours: int, search: str) -> None:
    if n_neighbours < 1:
        found = f"n_neighbours={n_neighbours}"
        raise input_error(found, "at least 1", "leave n_neighbours out, or give a larger number")
    if search not in ("exact", "faiss"):
        found = f"search={search!r}"
        raise input_error(found, "'exact' or 'faiss'", "choose one of them")
    if search == "faiss":
        import faiss  # noqa: F401  # before the work, not after it


def _require_share(unassigned_above: float | None) -> None:
    if unassigned_above is not None and not 0 <= unassigned_above <= 1:
        found = f"unassigned_above={unassigned_above}"
        raise input_error(found, "a share from 0 to 1, such as 0.99", "choose another, or leave unassigned_above out")
