"""`annformer embed`."""

from __future__ import annotations

from typing import Literal

from annformer.cli._run import progress_wanted


def command(
    file: str,
    *,
    out: str,
    model: str = "annformer-base",
    key_added: str = "X_annformer",
    gene_key: str | None = None,
    layer: str | None = None,
    orthologs: str | None = None,
    max_length: int | None = None,
    seed: int | None = None,
    empty: Literal["nan", "drop", "error"] = "nan",
    content: Literal["all", "embedding"] = "all",
    device: str | None = None,
    workers: int = 1,
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Embed every cell of FILE and write a copy of FILE that holds the embeddings.

    Memory hardly grows with the number of cells: by their names and labels. The output appears whole or not at all; the work of a run
    that was stopped is kept beside it, and --resume goes on with it.

    Parameters
    ----------
    file
        The cells: an .h5ad or 10x .h5 file, a .zarr folder, or a 10x folder with matrix.mtx.
    out
        What to write: an .h5ad file or a .zarr folder.
    model
        A model folder, a folder of scGPT's authors, the name of a checkpoint such as scgpt-human, or org/repository on the Hub; by default
        the model that ships with annformer.
    key_added
        Name of the embedding in obsm.
    gene_key
        Column of var that holds the gene names; by default the names of var.
    layer
        Layer that holds the counts; by default it is found out.
    orthologs
        Table of two columns for other species: names there, human names.
    max_length
        Most genes read per cell, plus one; by default as the model was trained. Fewer is faster and coarser.
    seed
        Of the choice of genes in cells longer than that, and of ties between equal counts; by default the model's.
    empty
        Cells without any known expressed gene: a row of NaN, left out, or an error.
    content
        Keep everything that FILE holds, or only obs beside the embedding.
    device
        Where to compute, such as cuda; by default the CPU.
    workers
        Threads that read ahead.
    threads
        Threads of the network; by default as many as there are cores.
    resume
        Go on with the work of a run that was stopped.
    overwrite
        Replace OUT if it exists, and discard the work of a run that was stopped unless --resume is given.
    """
    from annformer.genes import read_orthologs
    from annformer.tasks.embedding import embed_file

    record = embed_file(
        file,
        out,
        model=model,
        key_added=key_added,
        gene_key=gene_key,
        layer=layer,
        orthologs=None if orthologs is None else read_orthologs(orthologs),
        max_length=max_length,
        seed=seed,
        empty=empty,
        content=content,
        device=device,
        workers=workers,
        threads=threads,
        progress=progress_wanted(),
        resume=resume,
        overwrite=overwrite,
    )
    print(f"{out}: obsm[{key_added!r}] by {record['model']} from {record['counts']['where']}")
