"""Cells to embeddings: `embed` for an AnnData in memory, `embed_file` from file to file in bounded memory."""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from anndata import AnnData
from jaxtyping import Bool, Float

import annformer
from annformer.data.anndata import AnnDataSource
from annformer.data.write import Addition, Content, require_place, write_copy
from annformer.errors import AnnformerWarning, input_error
from annformer.genes import GeneMatch
from annformer.scgpt import DEFAULT_MODEL, ScGPT
from annformer.tasks._encoding import embeddings, loaded, matched
from annformer.tasks._output import AnotherWayError, Output
from annformer.tasks._place import check_key, check_target, put
from annformer.tasks._threads import torch_threads
from annformer.tokenizer import TokenizerSettings

logger = logging.getLogger(__name__)

Empty = Literal["nan", "error", "drop"]

FLUSH_EVERY = 4_096
"""Cells after which the work done is made safe on the disk."""
FLUSH_SECONDS = 30.0
"""Seconds after which it is made safe even when that many cells have not come: a kill loses no more than this, however slow the model."""


def embed(
    adata: AnnData,
    model: ScGPT | str | Path = DEFAULT_MODEL,
    *,
    key_added: str = "X_annformer",
    gene_key: str | None = None,
    layer: str | None = None,
    orthologs: Mapping[str, str] | None = None,
    max_length: int | None = None,
    seed: int | None = None,
    empty: Empty = "nan",
    device: str | None = None,
    workers: int = 1,
    progress: bool | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Embed every cell: one vector of length 1 that says what the network makes of its expressed genes.

    The same cell gets the same vector (to 1e-6) in whatever file, order, chunk or gene order it stands.

    Parameters
    ----------
    adata
        Raw counts, or what is left of them; where they are is found out and logged. A view becomes an AnnData of its own when the
        embedding is written into it.
    model
        A loaded model, a model folder, or the name of a checkpoint; by default the one that ships with the package.
    gene_key
        Column of `var` with gene names; None: `var_names`.
    layer
        Layer with the counts; None: layers "counts" and "raw_counts", X, `.raw.X`, the first that holds counts.
    orthologs
        Gene name in `adata` -> human gene symbol, for other species.
    max_length
        Most genes read per cell, plus one; None: as the model was trained. Fewer is faster and coarser.
    seed
        Of the choice of genes in longer cells, and of ties between equal counts; None: the model's.
    empty
        What becomes of cells without any expressed gene that the model knows: a row of NaN and a warning, an error, or left out (only
        with `copy`).
    device
        Where to compute, such as "cuda"; None: where the model is. A loaded model is moved there and stays there.
    workers
        Threads that read ahead; 0: none.
    progress
        Show a progress bar; None: when stderr is a terminal.
    copy
        Return a copy with the embedding instead of writing into `adata`.

    Returns
    -------
    None, or the copy. Sets `obsm[key_added]` (float32, rows of length 1) and `uns["annformer"][key_added]` (model, settings, counts, gene
    match, version) and nothing else.
    """
    check_key(key_added)
    _check_choice("empty", empty, ("nan", "error", "drop"))
    _check_least("workers", workers, 0)
    _check_empty(empty, copy=copy)
    check_target(adata, copy=copy)
    model = loaded(model, device)
    source = AnnDataSource(adata, gene_key=gene_key, layer=layer, orthologs=orthologs)
    settings = _settings(model, max_length, seed)
    match = matched(source, model)
    rows = np.empty((source.n_obs, model.config.model.width), dtype=np.float32)
    written = 0
    for run in embeddings(model, source, settings, workers=workers, progress=progress):
        if empty == "error":
            _refuse_empty(run, written, source.obs_names)
        rows[written : written + len(run)] = run
        written += len(run)
    keep = ~np.isnan(rows[:, 0])
    _require_some(keep)
    _warn_empty(np.flatnonzero(~keep), source.obs_names, empty)
    record = _record(model, settings, source, match, keep)
    target = put(adata, key_added, rows, record, copy=copy)
    if not copy:
        return None
    return target[keep].copy() if empty == "drop" and not keep.all() else target


def embed_file(
    path_in: str | Path,
    path_out: str | Path,
    *,
    model: ScGPT | str | Path = DEFAULT_MODEL,
    key_added: str = "X_annformer",
    gene_key: str | None = None,
    layer: str | None = None,
    orthologs: Mapping[str, str] | None = None,
    max_length: int | None = None,
    seed: int | None = None,
    empty: Empty = "nan",
    content: Content = "all",
    device: str | None = None,
    workers: int = 1,
    threads: int | None = None,
    progress: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Embed every cell of a file and write a copy of the file with the embedding: `embed` in memory that does not grow with the cells.

    The output appears whole or not at all. Until then the work done stands beside it in `<path_out>.partial`, from where a killed run goes
    on with `resume=True` to the very same result.

    Parameters
    ----------
    path_in
        h5ad, zarr, 10x `.h5` or mtx folder. The last two are read whole when the output is written.
    path_out
        Ends in `.h5ad` or `.zarr`.
    content
        "all": everything the input holds, and the embedding. "embedding": only `obs` and the embedding.
    threads
        Threads of the network; None: as torch is set.
    resume
        Go on with an interrupted run, if there is one; refused when model, settings or input are not the same.
    overwrite
        Replace `path_out` when it exists, at the end; without `resume`, discard the work of an interrupted run, which is refused otherwise.

    Other parameters are those of `embed`.

    Returns
    -------
    What it also writes to `uns["annformer"][key_added]`.
    """
    check_key(key_added)
    _check_choice("empty", empty, ("nan", "error", "drop"))
    _check_least("workers", workers, 0)
    _check_choice("content", content, ("all", "embedding"))
    _check_least("threads", threads, 1)
    output = Output(Path(path_in), Path(path_out), overwrite=overwrite)
    with output, torch_threads(threads):
        source = AnnDataSource(output.path_in, gene_key=gene_key, layer=layer, orthologs=orthologs)
        if content == "all":
            require_place(source.container, output.path_in)
        model = loaded(model, device)
        settings = _settings(model, max_length, seed)
        match = matched(source, model)
        shape = (source.n_obs, model.config.model.width)
        output.require_room(shape, copied=content == "all")
        job = {"model": model.fingerprint, **settings.model_dump(), "counts": source.counts.where, "genes": _hash(match)}
        rows = output.begin(job, shape, resume=resume)
        flushed = time.monotonic()
        for run in embeddings(model, source, settings, start=rows.done, workers=workers, progress=progress):
            if empty == "error":
                _refuse_empty(run, rows.done + rows.unsafe, source.obs_names)
            rows.append(run)
            if rows.unsafe >= FLUSH_EVERY or time.monotonic() - flushed > FLUSH_SECONDS:
                rows.flush()
                flushed = time.monotonic()
        rows.flush()
        keep = np.concatenate([~np.isnan(block[:, 0]) for block in rows.blocks()])
        _require_some(keep)
        if empty == "error" and not keep.all():  # done by a run that allowed them
            raise _empty_error(np.flatnonzero(~keep), source.obs_names)
        _warn_empty(np.flatnonzero(~keep), source.obs_names, empty)
        record = _record(model, settings, source, match, keep)
        addition = Addition(key_added, shape, rows.blocks, record)
        left_out = empty == "drop" and not keep.all()
        write_copy(source.container, output.path_in, output.result, addition, keep=keep if left_out else None, content=content)
        output.publish()
    return record


def _settings(model: ScGPT, max_length: int | None, seed: int | None) -> TokenizerSettings:
    asked = {"max_length": max_length, "seed": seed}
    changes = {name: value for name, value in asked.items() if value is not None}
    return TokenizerSettings.read(model.tokenizer.model_dump() | changes, where="what was asked for")


def _record(
    model: ScGPT, settings: TokenizerSettings, source: AnnDataSource, match: GeneMatch, keep: Bool[np.ndarray, "cell"]
) -> dict[str, Any]:
    """For `uns`: how the embedding came about, in values that h5ad and zarr hold."""
    counts = source.counts
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "settings": settings.model_dump(),
        "counts": {"where": counts.where, "kind": counts.kind, "note": counts.note},
        "genes": _plain(match.report().to_dict()),
        "n_empty": int((~keep).sum()),
        "version": annformer.__version__,
    }


def _plain(value: Any) -> Any:
    """Without None, which older readers do not know, and without gene names as keys, which may hold a `/`."""
    if not isinstance(value, Mapping):
        return value
    if value and all(isinstance(inner, list) for inner in value.values()):
        return [f"{name}: {', '.join(map(str, inner))}" for name, inner in value.items()]
    return {name: _plain(inner) for name, inner in value.items() if inner is not None}


def _hash(match: GeneMatch) -> str:
    return hashlib.sha256(np.ascontiguousarray(match.ids).tobytes()).hexdigest()[:16]


def _require_some(keep: Bool[np.ndarray, "cell"]) -> None:
    if not keep.any():
        found = f"none of the {len(keep):,} cells has an expressed gene that the model knows"
        raise input_error(found, "cells with counts", "look at the file with `annformer inspect`; choose another layer (--layer)")


def _warn_empty(rows: np.ndarray, names: np.ndarray, empty: Empty) -> None:
    if len(rows):
        fate = "they are left out" if empty == "drop" else "their embedding is NaN"
        msg = f"{_named(rows, names)} no expressed gene that the model knows: {fate}"
        warnings.warn(msg, AnnformerWarning, stacklevel=3)


def _refuse_empty(run: Float[np.ndarray, "cell width"], first: int, names: np.ndarray) -> None:
    empty = np.flatnonzero(np.isnan(run[:, 0]))
    if len(empty):
        raise _empty_error(first + empty, names)


def _empty_error(rows: np.ndarray, names: np.ndarray) -> AnotherWayError:
    remedy = "filter them out, or say what should become of them: empty='nan' or 'drop' (--empty), then resume (--resume) goes on"
    message = input_error(f"{_named(rows, names)} no expressed gene that the model knows", "expressed genes in every cell", remedy)
    return AnotherWayError(str(message))


def _named(rows: np.ndarray, names: np.ndarray) -> str:
    first = ", ".join(str(names[int(row)]) for row in rows[:5])
    more = ", ..." if len(rows) > 5 else ""
    return f"{len(rows):,} {'cell has' if len(rows) == 1 else 'cells have'} ({first}{more})"


def _check_empty(empty: Empty, *, copy: bool) -> None:
    if empty == "drop" and not copy:
        found = "empty='drop' would take cells out of your AnnData"
        raise input_error(found, "copy=True beside it", "pass copy=True, or use empty='nan'")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        found = f"{name}={value!r}"
        raise input_error(found, "one of " + ", ".join(map(repr, choices)), f"choose one of them for {name}")


def _check_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        found = f"{name}={value}"
        raise input_error(found, f"at least {least}", f"leave {name} out, or give a larger number")
