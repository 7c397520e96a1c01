"""`annformer compare`."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annformer.cli._place import require_free
from annformer.errors import input_error

if TYPE_CHECKING:
    from anndata import AnnData

    from annformer.comparison.result import Comparison

ANNOTATION_TABLES = ("predictions.csv", "confusion.csv", "reliability.csv", "coverage.csv", "novelty.csv", "novelty_mean.csv")
FILES = ("report.html", "integrated.h5ad", "scores.csv", "verdicts.csv", "per_type.csv")
"""What the folder of a comparison of integration holds."""
FILES_OF = {"integrate": FILES, "annotate": ("report.html", "scores.csv", "verdicts.csv", "per_type.csv", *ANNOTATION_TABLES)}


def command(
    task: str,
    file: str,
    *,
    out: str,
    label_key: str,
    batch_key: str | None = None,
    model: str = "annformer-base",
    methods: list[str] | None = None,
    seeds: int = 3,
    recipe: str | None = None,
    novelty: bool | None = None,
    gene_key: str | None = None,
    layer: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> None:
    """Do TASK on the cells of FILE with annformer and with the simple methods, score all, and say which to use.

    No method sees the types by which it is scored. OUT gets the page report.html, the numbers as CSV files, and with integrate the cells
    with every embedding (integrated.h5ad), with annotate what every method calls each cell (predictions.csv); it appears whole or not at
    all. A comparison that was stopped goes on when the same command is given again.

    Parameters
    ----------
    task
        What to compare: integrate, or annotate.
    file
        The cells: an .h5ad file or a .zarr folder.
    out
        Folder for the results.
    label_key
        Column of obs with the type of the cells; "unlabelled", "unknown" and nothing mean that there is none.
    batch_key
        Column of obs with the batch of every cell. integrate needs it; annotate holds out whole batches with it, without it cells only.
    model
        The pretrained model: a folder, the name of a checkpoint, or org/repository on the Hub; by default the one that ships.
    methods
        Only these, such as fine-tuned zero-shot "PCA HVG" harmony-hvg, or annformer mapping "kNN PCA"; by default all that can run here,
        but annotate runs from-scratch only when it is named.
    seeds
        With how many seeds methods with randomness are run. Three or more say how much is chance; one is quick.
    recipe
        How annformer learns: a recipe that comes with it, or a YAML file; by default the one named like the task.
    novelty
        annotate only: leave one type after the other out of what is learned from; by default where there are few types and cells.
    gene_key
        Column of var that holds the gene names; by default the names of var.
    layer
        Layer that holds the counts; by default it is found out.
    device
        Where annformer computes, such as cuda; by default the CPU.
    threads
        Threads of the network; by default as many as there are cores.
    overwrite
        Replace the folder of an earlier comparison. One that was stopped goes on all the same.
    """
    compare = _task(task)
    require_own(task, batch_key, novelty=novelty)
    recipe = recipe or task
    given = {"out": out, "batch_key": batch_key, "label_key": label_key, "model": model, "recipe": recipe, "seeds": seeds}
    own = {"novelty": novelty} if task == "annotate" else {}
    more = {"methods": methods, "gene_key": gene_key, "layer": layer, "device": device, "threads": threads}
    _require_seed(seeds)
    folder = Path(out)
    require_free(folder, FILES_OF[task], "comparison", overwrite=overwrite)

    from annformer.comparison.cells import read_cells
    from annformer.report import require_packages

    require_packages()
    adata = read_cells(file, batch_key=batch_key, label_key=label_key, layer=layer, gene_key=gene_key)
    options = {"recipe": recipe, "device": device, "threads": threads}
    unfinished = folder.with_name(f".{folder.name}.comparing")
    found = compare(
        adata,
        batch_key=batch_key,
        label_key=label_key,
        model=model,
        seeds=range(seeds),
        wanted=methods,
        layer=layer,
        gene_key=gene_key,
        name=Path(file).name,
        command=spelt(task, file, given | own | more),
        folder=unfinished,
        **own,
        **options,
    )
    write(found, adata, folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    _show(found)
    print(f"\nLook at {folder / 'report.html'} (also {', '.join(str(folder / name) for name in FILES_OF[task][1:])})")


def spelt(task: str, file: str, options: dict[str, Any]) -> str:
    """Write the words that make the same comparison again."""
    words = ["annformer", "compare", task, file]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", *map(_word, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def write(found: Comparison, adata: AnnData, folder: Path) -> None:
    """Fill `folder`, whole or not at all; the embeddings, where there are some, are put into `adata`."""
    from annformer.checkpoints import write_folder
    from annformer.comparison import PAGES
    from annformer.comparison.methods import CONTROL
    from annformer.comparison.table import csv_tables, obsm_key

    for method, embedding in found.embeddings.items():
        if method != CONTROL:
            adata.obsm[obsm_key(method, found.ours)] = embedding

    def fill(fresh: Path) -> None:
        if found.embeddings:
            adata.write_h5ad(fresh / "integrated.h5ad")
        for name, table in csv_tables(found).items():
            table.to_csv(fresh / name, index=False)
        import_module(PAGES[found.task]).write_page(found, fresh / "report.html")

    write_folder(folder, FILES_OF[found.task], fill)


def _task(task: str) -> Callable[..., Comparison]:
    from annformer.comparison import TASKS

    if task not in TASKS:
        near = get_close_matches(task, TASKS, n=1)
        found = f"there is nothing to compare called {task!r}"
        raise input_error(found, f"one of {', '.join(TASKS)}", f"did you mean {near[0]}?" if near else f"write {next(iter(TASKS))}")
    compare: Callable[..., Comparison] = import_module(TASKS[task]).compare
    return compare


def require_own(task: str, batch_key: str | None, *, novelty: bool | None) -> None:
    """Refuse options that the task lacks, or needs and was not given."""
    if task == "integrate" and batch_key is None:
        found = "compare integrate needs --batch_key, which was not given"
        raise input_error(found, "the column of obs with the batch of every cell", "add --batch_key and its name")
    if task != "annotate" and novelty is not None:
        found = f"compare {task} has no --novelty"
        raise input_error(found, "an option of compare annotate", "leave it out")


def _require_seed(seeds: int) -> None:
    if seeds < 1:
        found = f"--seeds {seeds}"
        raise input_error(found, "at least 1", "give 1 to be quick, 3 or more to know how much is chance")


def _show(found: Comparison) -> None:
    from rich.console import Console

    from annformer.comparison.table import on_terminal

    console = Console() if sys.stdout.isatty() else Console(width=160)  # a file or a pipe has no width that could be too small
    for part in on_terminal(found):
        console.print(part)
