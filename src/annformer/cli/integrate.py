"""`annformer integrate`."""

from __future__ import annotations

import logging
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annformer.cli._place import require_free
from annformer.errors import input_error

if TYPE_CHECKING:
    from anndata import AnnData

    from annformer.tasks.integration import BatchIntegrator

log = logging.getLogger(__name__)

FILES = ("report.html", "integrated.h5ad", "history.csv", "scores.csv", "model")
KEY, FLOOR_KEY = "X_annformer", "X_pca_hvg"


def command(
    file: str,
    *,
    out: str,
    batch_key: str,
    label_key: str | None = None,
    model: str = "annformer-base",
    recipe: str = "integrate",
    corrected: str | None = None,
    gene_key: str | None = None,
    layer: str | None = None,
    epochs: float | None = None,
    seed: int = 0,
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> None:
    """Give the cells of several batches one embedding in which types lie apart and batches do not.

    OUT gets the cells with obsm["X_annformer"] (integrated.h5ad), the fine-tuned model, the losses (history.csv) and the page
    report.html; it appears whole or not at all. A run that was stopped goes on when the same command is given again. Whether the result is
    better than a simple method's is what `annformer compare integrate` finds out.

    Parameters
    ----------
    file
        The cells: an .h5ad file or a .zarr folder with counts.
    out
        Folder for the results.
    batch_key
        Column of obs with the batch of every cell.
    label_key
        Column of obs with the type of the cells, if known: only to colour the maps and to score; training never sees it.
    model
        The model to begin with: a folder, the name of a checkpoint, or org/repository on the Hub; by default the one that ships.
    recipe
        integrate, integrate-original (the settings of scGPT's authors, slow), or a YAML file.
    corrected
        Also write corrected expression into obsm["annformer_corrected"]: "mean" of the batches, or the name of a batch as which all cells
        are shown.
    gene_key
        Column of var that holds the gene names; by default the names of var.
    layer
        Layer that holds the counts; by default it is found out.
    epochs
        Times that every cell is seen; by default as the recipe says. Fewer is quicker.
    seed
        Of everything that is drawn.
    device
        Where to compute, such as cuda; by default the CPU.
    threads
        Threads of the network; by default as many as there are cores.
    overwrite
        Replace the folder of an earlier integration. One that was stopped goes on all the same.
    """
    given = {"out": out, "batch_key": batch_key, "label_key": label_key, "model": model, "recipe": recipe, "corrected": corrected}
    more = {"gene_key": gene_key, "layer": layer, "epochs": epochs, "seed": seed, "device": device, "threads": threads}
    folder = Path(out)
    require_free(folder, FILES, "integration", overwrite=overwrite)

    from annformer.report import require_packages
    from annformer.tasks._integration_recipe import IntegrationRecipe
    from annformer.tasks.integration import BatchIntegrator

    require_packages()
    settings = IntegrationRecipe.named(recipe)
    if epochs is not None:
        train = settings.train.model_dump() | {"epochs": epochs}
        settings = settings.with_(train=train, least_steps=0)
    adata = _read(file, batch_key=batch_key, label_key=label_key, layer=layer, gene_key=gene_key, corrected=corrected)
    integrator = BatchIntegrator(
        model, batch_key=batch_key, recipe=settings, layer=layer, gene_key=gene_key, seed=seed, device=device, threads=threads
    )
    unfinished = folder.with_name(f".{folder.name}.training")
    integrator.fit(adata, folder=unfinished)
    integrator.transform(adata, key_added=KEY)
    if corrected is not None:
        integrator.corrected(adata, batch=corrected)
    said = shlex.join(["annformer", "integrate", file, *_words(given | more)])
    _write(integrator, adata, folder, name=Path(file).name, label_key=label_key, command=said, seed=seed)
    shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{folder / 'integrated.h5ad'}: obsm[{KEY!r}] of {adata.n_obs:,} cells of {len(integrator.batches_)} batches")
    print(f"Look at {folder / 'report.html'}")


def _read(file: str, *, batch_key: str, label_key: str | None, layer: str | None, gene_key: str | None, corrected: str | None) -> AnnData:
    """Read the cells once it is clear that the columns and the batch to be shown as are there."""
    import anndata

    from annformer.comparison.cells import labels_of, share_types
    from annformer.data.anndata import AnnDataSource

    with AnnDataSource(file, layer=layer, gene_key=gene_key) as source:
        source.codes("batch", batch_key)
        names = source.categories["batch"]
        if corrected is not None and corrected not in ("mean", *names):
            found = f"--corrected {corrected!r} is no batch of obs[{batch_key!r}]"
            raise input_error(found, f"mean, or one of {', '.join(map(repr, names[:8]))}", "choose one of them")
        if label_key is not None:
            labels = labels_of(source, label_key)
            if not share_types(labels, source.container.obs.column(batch_key).astype(str).to_numpy()):
                what = "no type of obs[%r] is in two batches: type and batch cannot be told apart, and types may be drawn together"
                log.warning(what, label_key)
    return anndata.read_zarr(file) if Path(file).is_dir() else anndata.read_h5ad(file)


def _words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def _write(integrator: BatchIntegrator, adata: AnnData, folder: Path, *, name: str, label_key: str | None, command: str, seed: int) -> None:
    from annformer.checkpoints import write_folder
    from annformer.cli._integrate_page import Shown, write_page

    shown = Shown.of(integrator, adata, label_key=label_key, name=name, command=command, seed=seed)
    adata.obsm[FLOOR_KEY] = shown.embeddings["PCA HVG"]

    def fill(fresh: Path) -> None:
        adata.write_h5ad(fresh / "integrated.h5ad")
        integrator.save(fresh / "model")
        integrator.history_.to_csv(fresh / "history.csv", index=False)
        if shown.scores is not None:
            shown.scores.to_csv(fresh / "scores.csv", index=False)
        write_page(shown, fresh / "report.html")

    write_folder(folder, FILES, fill)
