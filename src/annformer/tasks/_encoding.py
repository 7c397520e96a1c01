"""Cells to vectors of length 1, for every task on a finished model: which model, which genes, how long it will take, how it goes."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from annformer.data.anndata import AnnDataSource
from annformer.data.source import CellSource
from annformer.errors import AnnformerWarning, input_error
from annformer.genes import GeneMatch
from annformer.inference import encode_cells, estimate
from annformer.scgpt import ScGPT
from annformer.tokenizer import TokenizerSettings

logger = logging.getLogger(__name__)

FEW_GENES = 0.5
"""Share of the columns below which a warning says how few are read."""
ESTIMATE_ABOVE = 2_000
"""Cells from which on a few are timed first."""


def loaded(model: ScGPT | str | Path, device: str | None) -> ScGPT:
    """The model itself, or the one of that name, on `device` if one is named."""
    place = None if device is None else device_named(device)
    if not isinstance(model, ScGPT):
        return ScGPT.from_pretrained(model, device=place or "cpu")
    return model if place is None else model.to(place)


def device_named(name: str) -> torch.device:
    """Find a device; an InputError where there is none of that name."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        found = f"there is no device {name!r} here ({str(error).splitlines()[0]})"
        raise input_error(found, "cpu, or the name of an accelerator that torch finds", "leave device (--device) out") from None
    return device


def matched(source: AnnDataSource, model: ScGPT) -> GeneMatch:
    """Match the genes; refuse what this task cannot give the model."""
    model.require_no_batch()
    match = source.match(model.vocab)
    if match.share < FEW_GENES:
        shares = f"only {match.share:.0%} of the columns ({(match.ids >= 0).sum():,}) are genes that the model knows"
        msg = f"{source.name}: {shares}; the others are not read. `annformer inspect` shows the names, gene_key (--gene_key) chooses others"
        warnings.warn(msg, AnnformerWarning, stacklevel=3)
    if source.counts.kind not in ("counts", "log-normalised"):
        msg = f"{source.name}: {source.counts.where} is {source.counts.kind}, not counts: {source.counts.note}"
        warnings.warn(msg, AnnformerWarning, stacklevel=3)
    return match


def embeddings(
    model: ScGPT,
    source: CellSource,
    settings: TokenizerSettings,
    *,
    start: int = 0,
    workers: int = 1,
    progress: bool | None = None,
) -> Iterator[Float[np.ndarray, "cell width"]]:
    """Runs of embeddings in order, divided by their length; says beforehand what it will take and shows how it goes."""
    if source.n_obs - start > ESTIMATE_ABOVE:
        for line in estimate(model, source, settings=settings, start=start).lines():
            logger.info(line)
    with progress_bar(source.n_obs, start, progress=progress) as advance:
        runs = encode_cells(model, source, settings=settings, start=start, workers=workers, advance=advance)
        with closing(runs):  # type: ignore[type-var]  # a generator
            for _, states in runs:
                yield states / np.linalg.norm(states, axis=1, keepdims=True)


@contextmanager
def progress_bar(n_cells: int, done: int, *, progress: bool | None, what: str = "embedding") -> Iterator[Any]:
    """Give a function that moves a bar on stderr by so many cells; None where no bar is wanted (`progress` None: no terminal)."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=n_cells, completed=done, rate="")

        def advance(n: int) -> None:
            bar.update(task, advance=n, rate=f"{bar.tasks[0].speed or 0:,.1f} cells/s")

        yield advance
