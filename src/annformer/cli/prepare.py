"""`annformer prepare`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from annformer.data.store_manifest import StoreManifest

log = logging.getLogger(__name__)


def command(
    files: list[str],
    *,
    out: str,
    exclude: list[str] | None = None,
    obs_filter: str | None = None,
    columns: list[str] | None = None,
    vocab: str | None = None,
    allow_normalised: bool = False,
    seed: int = 0,
    memory_gb: float = 1.0,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Turn data sets into one shuffled store for pretraining.

    Genes are brought to approved names, empty and duplicate cells are left out. Memory does not grow with the number of cells, but
    for their labels. The store appears whole or not at all; the work of a run that was stopped is kept beside it, and --resume goes on with
    it.

    Parameters
    ----------
    files
        Any mix of .h5ad and 10x .h5 files, .zarr folders, 10x folders with matrix.mtx, folders that hold such, TileDB-SOMA experiments
        (folders or s3://...), the CELLxGENE Census (census:2025-01-30, census:stable, census:stable/mus_musculus), and tables (.tsv,
        .csv) with a column `path` and any of gene_key, layer, orthologs, obs_filter, measurement, study, tissue, assay ...
    out
        The store: a folder that is made.
    exclude
        Data sets whose cells must not get into the store, recognised by their counts: what a model will be evaluated on.
    obs_filter
        Which cells of SOMA experiments and the Census, e.g. "tissue_general in ['blood', 'bone marrow'] and disease == 'normal'". Cells
        that the Census holds twice are taken once: is_primary_data == True is added, unless the filter names is_primary_data itself.
    columns
        Label columns of obs to keep; by default study, tissue, assay, cell_type and batch. In the Census study is dataset_id and batch is
        donor_id.
    vocab
        A vocab.json with the genes to keep; by default every approved gene that some data set has.
    allow_normalised
        Also take data that are not counts; logarithms are undone.
    seed
        Of the order of the cells.
    memory_gb
        Memory for sorting; less makes more, smaller files on the way.
    resume
        Go on with the work of a run that was stopped.
    overwrite
        Replace OUT if it is a store.
    """
    from annformer.data.find_studies import find_studies
    from annformer.data.store_plan import LABELS
    from annformer.data.store_writer import write_store
    from annformer.vocab import GeneVocab

    with _bar() as progress:
        manifest = write_store(
            find_studies(files, obs_filter=obs_filter),
            out,
            exclude=exclude or (),
            vocab=None if vocab is None else GeneVocab.from_json(vocab).with_specials(),
            columns=LABELS if columns is None else columns,
            allow_normalised=allow_normalised,
            seed=seed,
            memory_gb=memory_gb,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    print(_summary(out, manifest))


def _summary(out: str, manifest: StoreManifest) -> str:
    read, (empty, duplicates, excluded) = sum(source.n_cells for source in manifest.sources), _left_out(manifest)
    size = sum(shard.n_bytes for shard in manifest.shards)
    kept = f"{manifest.n_cells:,} of {read:,} cells from {len(manifest.sources)} data sets, {manifest.n_genes:,} genes"
    left = f"left out: {empty:,} empty, {duplicates:,} duplicate, {excluded:,} excluded"
    return f"{out}: {kept}, {size / 1e6:,.1f} MB in {len(manifest.shards)} shards\n{left}"


def _left_out(manifest: StoreManifest) -> tuple[int, int, int]:
    sources = manifest.sources
    return sum(s.n_empty for s in sources), sum(s.n_duplicates for s in sources), sum(s.n_excluded for s in sources)


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """Progress bars of the two phases, on a terminal that is not to be quiet."""
    if not (sys.stderr.isatty() and log.isEnabledFor(logging.INFO)):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks = {phase: bar.add_task(f"{phase} cells", total=None) for phase in ("reading", "writing")}
        yield lambda phase, done, total: bar.update(tasks[phase], completed=done, total=total)
