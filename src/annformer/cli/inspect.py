"""`annformer inspect`."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from annformer.tasks.inspection import Inspection

log = logging.getLogger("annformer")


def command(
    path: str, *, model: str | None = "annformer-base", gene_key: str | None = None, layer: str | None = None, json: bool = False
) -> None:
    """Say what a file of cells or a model is, whether embedding it will work, and what is odd about it.

    Problems inside the file are findings, and the exit status is 0; it is 2 when the file cannot be read.

    Parameters
    ----------
    path
        Cells: an .h5ad or 10x .h5 file, a .zarr folder or a 10x folder with matrix.mtx. Or a model: its folder, the authors' folder, or
        the name of a checkpoint.
    model
        Model that the cells are meant for: its vocabulary is matched, and the time of embedding is measured. By default the one that ships
        with annformer; null: none, only the table of human genes.
    gene_key
        Column of var that holds the gene names; by default the names of var.
    layer
        Layer that holds the counts; by default it is found out.
    json
        Print everything as JSON.
    """
    from annformer.tasks.inspection import inspect

    if log.getEffectiveLevel() == logging.INFO:
        log.setLevel(logging.WARNING)  # the report says it all
    inspection = inspect(path, model=model, gene_key=gene_key, layer=layer)
    if json:
        import json as encoder

        print(encoder.dumps(inspection.to_dict(), indent=2))
    elif sys.stdout.isatty():
        _print_rich(inspection)
    else:
        print("\n".join(inspection.lines()))


def _print_rich(inspection: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from annformer.tasks.inspection import as_words

    console = Console(highlight=False)
    console.print(Text(f"{inspection.source}: {inspection.what}", style="bold"))
    for section, values in inspection.facts.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        for name, value in values.items():
            table.add_row("  " + name, Text(as_words(name, value).replace("\n    ", "\n")))
        console.print(Text(f"\n{section}", style="bold cyan"), table, sep="\n")
    console.print(Text("\nwhat is odd" if inspection.findings else "\nnothing is odd", style="bold"))
    for finding in inspection.findings:
        console.print(
            Text(f"  {finding.weight}: ", style="red" if finding.weight == "stops" else "yellow").append(finding.text, style="default")
        )
