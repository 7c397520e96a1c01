"""`annformer map fit|add|predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from annformer.cli._place import require_free
from annformer.cli._run import progress_wanted
from annformer.cli._table import require_no_table, write_table

if TYPE_CHECKING:
    from annformer.tasks.mapping import ReferenceMapper


def fit(
    file: str,
    *,
    label_key: str,
    out: str,
    model: str = "annformer-base",
    n_neighbours: int = 15,
    search: Literal["exact", "faiss"] = "exact",
    embedding: str | None = None,
    gene_key: str | None = None,
    layer: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> None:
    """Embed the labelled cells of a reference and write them as an index that `annformer map predict` takes.

    OUT appears whole or not at all. It holds the model as well, by which every query will be embedded.

    Parameters
    ----------
    file
        The reference: an .h5ad file or a .zarr folder, with the labels in obs. It is read in bounded memory.
    label_key
        Column of obs with the label of every cell; cells without one ("unlabelled", "unknown", nothing) are left out.
    out
        Folder for the index.
    model
        The model: a folder, the name of a checkpoint, or org/repository on the Hub; by default the one that ships.
    n_neighbours
        Neighbours that vote for the label of a cell.
    search
        exact compares a cell with the whole reference; faiss only with those likely to be near: for hundreds of thousands of cells.
    embedding
        Name in obsm of an embedding that `annformer embed` wrote by the same model, to use instead of embedding again.
    gene_key
        Column of var that holds the gene names; by default the names of var.
    layer
        Layer that holds the counts; by default it is found out.
    device
        Where to compute, such as cuda; by default the CPU.
    threads
        Threads; by default as many as there are cores.
    overwrite
        Replace an index.
    """
    folder = Path(out)
    from annformer.tasks._index import FILES
    from annformer.tasks.mapping import ReferenceMapper

    require_free(folder, FILES, "index", overwrite=overwrite)
    mapper = ReferenceMapper(
        model,
        label_key=label_key,
        n_neighbours=n_neighbours,
        search=search,
        layer=layer,
        gene_key=gene_key,
        device=device,
        threads=threads,
    )
    mapper.fit(file, embedding=embedding, progress=progress_wanted())
    mapper.save(folder)
    _say(mapper, folder)


def add(
    file: str,
    *,
    index: str,
    embedding: str | None = None,
    gene_key: str | None = None,
    layer: str | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> None:
    """Add the labelled cells of another study to an index, which is replaced when all is done.

    The labels are read from the column of the same name as in the reference.

    Parameters
    ----------
    file
        The cells: an .h5ad file or a .zarr folder, with the labels in obs. Those that are in the index already are left out.
    index
        Folder that `annformer map fit` wrote.
    embedding
        Name in obsm of an embedding that `annformer embed` wrote by the model of the index, to use instead of embedding again.
    gene_key
        Column of var that holds the gene names; by default the names of var.
    layer
        Layer that holds the counts; by default it is found out.
    device
        Where to compute, such as cuda; by default the CPU.
    threads
        Threads; by default as many as there are cores.
    """
    from annformer.tasks.mapping import ReferenceMapper

    mapper = ReferenceMapper.load(index, layer=layer, gene_key=gene_key, device=device, threads=threads)
    before = mapper.n_cells_
    mapper.add(file, embedding=embedding, progress=progress_wanted())
    mapper.save(index)
    print(f"{file}: {mapper.n_cells_ - before:,} cells added")
    _say(mapper, Path(index))


def predict(
    file: str,
    *,
    index: str,
    out: str,
    key_added: str = "mapped_cell_type",
    unassigned_above: float | None = None,
    embedding: str | None = None,
    gene_key: str | None = None,
    layer: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> None:
    """Name the cells of FILE after their nearest neighbours in the reference, and write them with the result to OUT.

    obs gets the label that most neighbours have (mapped_cell_type), their share (_share), the mean cosine distance to the neighbours
    (_distance) and the share of the reference whose cells lie nearer to their own neighbours (_novelty). The same columns stand in a CSV
    file beside OUT.

    Parameters
    ----------
    file
        The cells: an .h5ad or 10x .h5 file, a .zarr folder, or a 10x folder with matrix.mtx.
    index
        Folder that `annformer map fit` wrote.
    out
        What to write: an .h5ad file or a .zarr folder.
    key_added
        Name of the column with the label; the others begin with it.
    unassigned_above
        Novelty, from 0 to 1, above which a cell is "unassigned"; by default every cell gets a label.
    embedding
        Name in obsm of an embedding that `annformer embed` wrote by the model of the index, to use instead of embedding again.
    gene_key
        Column of var that holds the gene names; by default the names of var.
    layer
        Layer that holds the counts; by default it is found out.
    device
        Where to compute, such as cuda; by default the CPU.
    threads
        Threads; by default as many as there are cores.
    overwrite
        Replace OUT and the CSV file if they exist.
    """
    from annformer.tasks.mapping import ReferenceMapper

    table_path = require_no_table(Path(out), overwrite=overwrite)
    mapper = ReferenceMapper.load(index, layer=layer, gene_key=gene_key, device=device, threads=threads)
    table = mapper.predict_file(
        file,
        out,
        key_added=key_added,
        unassigned_above=unassigned_above,
        embedding=embedding,
        progress=progress_wanted(),
        overwrite=overwrite,
    )
    write_table(table, table_path)
    counts = table[key_added].value_counts()
    counted = ", ".join(f"{name} {n:,}" for name, n in counts.items() if n)
    print(f"{out}: obs[{key_added!r}] of {len(table):,} cells: {counted}")
    share, novelty = table[f"{key_added}_share"].median(), table[f"{key_added}_novelty"].median()
    print(f"median share {share:.2f}, median novelty {novelty:.3f} (0.5: as near to the reference as its own cells are to each other)")
    print(f"{table_path}: the same columns")


def _say(mapper: ReferenceMapper, folder: Path) -> None:
    classes = mapper.classes_
    print(f"{folder}: {mapper.n_cells_:,} cells of {len(classes)} types ({', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''})")
