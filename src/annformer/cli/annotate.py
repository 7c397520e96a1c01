"""`annformer annotate fit|predict`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from annformer.cli._place import require_free
from annformer.cli._run import progress_wanted
from annformer.cli._table import require_no_table, write_table

if TYPE_CHECKING:
    from annformer.tasks.annotation import CellTypeClassifier

KEY = "predicted_cell_type"


def fit(
    file: str,
    *,
    label_key: str,
    out: str,
    batch_key: str | None = None,
    model: str = "annformer-base",
    recipe: str = "annotate",
    tuning: Literal["frozen", "full", "low-rank", "none"] | None = None,
    embedding: str | None = None,
    gene_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> None:
    """Learn the types of the cells of a reference, and write what `annformer annotate predict` takes.

    OUT gets a model folder that holds the network and the classifier; it appears whole or not at all. A run that fine-tunes the network and
    was stopped goes on when the same command is given again. How good the result is beside simple methods is what
    `annformer compare annotate` finds out.

    Parameters
    ----------
    file
        The reference: an .h5ad file or a .zarr folder, with counts, and the types in obs.
    label_key
        Column of obs with the type of every cell; cells with "unlabelled" or "unknown" are left out.
    out
        Folder for the model.
    batch_key
        Column of obs with the donor, batch or study: what is chosen and calibrated is then meant for cells of other batches.
    model
        The model to begin with: a folder, the name of a checkpoint, or org/repository on the Hub; by default the one that ships.
    recipe
        annotate, annotate-original (the settings of scGPT's authors, slow), or a YAML file.
    tuning
        What happens to the network: frozen, full, low-rank, or none (it takes no part); by default as the recipe says.
    embedding
        Name in obsm of an embedding that `annformer embed` wrote by the same model, to use instead of embedding again (tuning frozen).
    gene_key
        Column of var that holds the gene names; by default the names of var.
    layer
        Layer that holds the counts; by default it is found out.
    seed
        Of everything that is drawn.
    device
        Where to compute, such as cuda; by default the CPU.
    threads
        Threads; by default as many as there are cores.
    overwrite
        Replace the folder of an earlier classifier. A fine-tuning that was stopped goes on all the same.
    """
    folder = Path(out)
    from annformer.checkpoints import CLASSIFIER, MODEL_FILES
    from annformer.tasks._annotation_recipe import AnnotationRecipe
    from annformer.tasks.annotation import CellTypeClassifier

    require_free(folder, (*MODEL_FILES, CLASSIFIER), "classifier", overwrite=overwrite)
    settings = AnnotationRecipe.named(recipe)
    if tuning is not None:
        settings = settings.with_(tuning=tuning)
    classifier = CellTypeClassifier(
        model,
        label_key=label_key,
        batch_key=batch_key,
        recipe=settings,
        layer=layer,
        gene_key=gene_key,
        seed=seed,
        device=device,
        threads=threads,
    )
    unfinished = folder.with_name(f".{folder.name}.training") if settings.tunes else None
    classifier.fit(file, folder=unfinished, embedding=embedding, progress=progress_wanted())
    classifier.save(folder)
    if unfinished is not None:  # that of another fine-tuning would have been refused
        shutil.rmtree(unfinished, ignore_errors=True)
    _say(classifier, folder)


def predict(
    file: str,
    *,
    model: str,
    out: str,
    key_added: str = KEY,
    coverage: float = 0.9,
    unassigned_above: float = 0.99,
    cluster_key: str | None = None,
    embedding: str | None = None,
    gene_key: str | None = None,
    layer: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> None:
    """Call the types of the cells of FILE, and write the cells with them to OUT.

    obs gets the type (predicted_cell_type), its probability (_confidence), how strange the cell is to the reference (_novelty), all types
    that cannot be excluded (_set), and what the two parts of the classifier would call alone (_by_expression, _by_network). The same
    columns stand in a CSV file beside OUT.

    Parameters
    ----------
    file
        The cells: an .h5ad or 10x .h5 file, a .zarr folder, or a 10x folder with matrix.mtx.
    model
        Folder that `annformer annotate fit` wrote.
    out
        What to write: an .h5ad file or a .zarr folder.
    key_added
        Name of the column with the type; the others begin with it.
    coverage
        Share of the cells, if they are like those of the reference, whose set holds their type.
    unassigned_above
        Novelty, from 0 to 1, above which a cell is "unassigned": with 0.99, so is one of a hundred cells of known types. 1: none is.
    cluster_key
        Column of obs with clusters: _majority gets the type that most cells of the cluster are called.
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
        Replace OUT and the CSV file if they exist.
    """
    from annformer.tasks.annotation import CellTypeClassifier

    table_path = require_no_table(Path(out), overwrite=overwrite)
    classifier = CellTypeClassifier.load(model, layer=layer, gene_key=gene_key, device=device, threads=threads)
    table = classifier.predict_file(
        file,
        out,
        key_added=key_added,
        coverage=coverage,
        unassigned_above=unassigned_above,
        cluster_key=cluster_key,
        embedding=embedding,
        progress=progress_wanted(),
        overwrite=overwrite,
    )
    write_table(table, table_path)
    counted = ", ".join(f"{name} {n:,}" for name, n in table[key_added].value_counts().items() if n)
    print(f"{out}: obs[{key_added!r}] of {len(table):,} cells: {counted}")
    print(f"{table_path}: the same columns")


def _say(classifier: CellTypeClassifier, folder: Path) -> None:
    scores, types = classifier.held_back_, classifier.classes_
    named = f"{', '.join(types[:8])}{', ...' if len(types) > 8 else ''}"
    print(f"{folder}: {sum(classifier.n_cells_):,} cells of {len(types)} types ({named})")
    print(f"on cells held back: {_scored(scores, '')} (always the most frequent type: {_scored(scores, 'majority_')})")
    parts = [part for part in ("expression", "network") if f"{part}_accuracy" in scores]
    if len(parts) > 1:
        print("its parts alone: " + "; ".join(f"{part} {_scored(scores, f'{part}_')}" for part in parts))


def _scored(scores: dict[str, float], whose: str) -> str:
    return f"accuracy {scores[whose + 'accuracy']:.3f}, macro-F1 {scores[whose + 'macro_f1']:.3f}"
