"""Which of the matrices holds counts, and what kind of data it is: found out from the values, never asked."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from annformer.data.formats import Container, Matrix
from annformer.data.readers import RowReader
from annformer.data.tables import unknown_name
from annformer.errors import InputError, input_error

logger = logging.getLogger(__name__)

Kind = Literal["counts", "log-normalised", "normalised", "scaled"]

SEARCHED = ("layers['counts']", "layers['raw_counts']", "X", ".raw.X")
LOG_MAX = 30.0
"""Larger values cannot be logarithms of expression: 2**30 molecules do not fit in a cell."""
RANKED = "as good as counts for value bins, which only need the order of the values within a cell; a profile also reads their size"
ADDED = "columns of one gene are added before the logarithm (taken as log1p)"
ONLY_ZEROS = "only zeros in the cells looked at"


@dataclass(frozen=True)
class CountsChoice:
    """Where the expression values were taken from."""

    where: str
    """"X", "layers['counts']", ".raw.X" ..."""
    kind: Kind
    note: str
    """What else there is to say, for people; "" if nothing."""


class Look(NamedTuple):
    """What a sample of values says about a matrix."""

    kind: Kind
    note: str
    whole: bool = False
    """All are whole numbers. Scaled values never are: negative whole numbers are counts with errors in them."""


def look(values: np.ndarray) -> Look:
    """Tell from some values what kind of data they are."""
    values = np.asarray(values)
    values = values[np.isfinite(values) & (values != 0)].astype(np.float64)
    if len(values) == 0:
        return Look("counts", ONLY_ZEROS)
    whole = bool((values == np.floor(values)).all())
    if values.min() < 0:
        note = f"values down to {values.min():.3g}"
        return Look("scaled", note if whole else f"{note}: centred or scaled", whole)
    if whole:
        ones = len(values) >= 1000 and values.max() == 1
        return Look("counts", "every value is 1: the counts were made binary, value bins carry no information" if ones else "", whole)
    if values.max() > LOG_MAX:
        return Look("normalised", f"not whole numbers, up to {values.max():.4g}: TPM, CPM or expected counts; {RANKED}")
    if values.max() <= 1:
        scale = f"values between 0 and {values.max():.3g}: shares, or scaled by their largest value"
        return Look("normalised", f"{scale}; {RANKED}, unless each gene was scaled by itself")
    back = np.expm1(values)
    whole = np.abs(back - np.rint(back)) <= 1e-4 * np.maximum(back, 1)
    origin = "log1p of whole counts" if whole.all() else "logarithms of normalised counts"
    return Look("log-normalised", f"{origin}, up to {values.max():.3g}; {RANKED}; {ADDED}")


def open_matrix(container: Container, where: str) -> RowReader:
    """Open one of the matrices; its shape must fit the tables."""
    matrix = container.matrices[where]
    with container.reading(where):
        reader = matrix.open()
    _require_shape(container, where, matrix, reader)
    return reader


def _require_shape(container: Container, where: str, matrix: Matrix, reader: RowReader) -> None:
    wanted = (len(container.obs.names), len(matrix.var.names))
    if reader.shape != wanted:
        found = (
            f"{where} of {container.name} has {reader.shape[0]} x {reader.shape[1]} values, obs has {wanted[0]} rows and var {wanted[1]}"
        )
        turned = reader.shape == wanted[::-1]
        raise input_error(
            found, "cells x genes, as long as obs and var", "transpose the matrix" if turned else "write the file again with AnnData"
        )


def choose(container: Container, layer: str | None) -> tuple[RowReader, CountsChoice]:
    """Choose the matrix to read: `layer`, else the first of `SEARCHED` with whole numbers, else the first that is not negative.

    One that seems to be empty is taken only if there is no other.
    """
    places = _places(container, layer)
    readers = {where: open_matrix(container, where) for where in places}
    looks = {}
    for where, reader in readers.items():
        with container.reading(where):
            looks[where] = look(reader.sample())
    full = [where for where in places if looks[where].note != ONLY_ZEROS]
    fit = [where for where in full if looks[where].kind == "counts"] or [where for where in full if looks[where].kind != "scaled"]
    fit = fit or [where for where in places if where not in full]
    fit = fit or [where for where in places if looks[where].whole]  # reading it will name the cell and the gene of the first error
    if not fit:
        raise _all_scaled(container, looks)
    where = fit[0]
    kind, note, _ = looks[where]
    passed = [
        f"{other} is {looks[other].kind}" if other in full else f"{other} has {ONLY_ZEROS}" for other in places[: places.index(where)]
    ]
    if kind != "counts" and layer is None:
        note = f"no matrix holds counts; {note}"
    choice = CountsChoice(where, kind, "; ".join([*([note] if note else []), *passed]))
    logger.info("%s: values from %s (%s)%s", container.name, where, kind, f": {choice.note}" if choice.note else "")
    return readers[where], choice


def _places(container: Container, layer: str | None) -> list[str]:
    names = list(container.matrices)
    if layer is not None:
        where = layer if layer in ("X", ".raw.X") else f"layers[{layer!r}]"
        if where in names:
            return [where]
        layers = [name[8:-2] for name in names if name.startswith("layers[")]
        found = f"{container.name} has no layer {layer!r}"
        raise unknown_name(found, layer, [*layers, *(n for n in names if n in ("X", ".raw.X"))], "one of", "layer")
    places = [where for where in SEARCHED if where in names]
    if not places:
        layers = [name for name in names if name not in SEARCHED]
        found = f"{container.name} has no X and no .raw" + (f", only {', '.join(layers)}" if layers else "")
        raise input_error(found, "a matrix of counts", "name the layer with layer=..." if layers else "add the counts as X")
    return places


def _all_scaled(container: Container, looks: dict[str, Look]) -> InputError:
    found = "; ".join(f"{where} has {seen.note}" for where, seen in looks.items())
    others = [name[8:-2] for name in container.matrices if name.startswith("layers[") and name not in looks]
    remedy = "take the counts from before scaling and keep them as adata.layers['counts']"
    return input_error(
        f"{container.name}: {found}",
        "counts, or at least values that are not negative",
        remedy + (f", or name one of the layers {others} with layer=..." if others else ""),
    )
