"""The cells that a task is given, or some of them, and embeddings that come with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

import h5py
import numpy as np
import zarr
from anndata import AnnData
from anndata.io import read_elem
from jaxtyping import Float32, Int

from annformer.data.anndata import AnnDataSource
from annformer.errors import input_error
from annformer.genes import GeneMatch
from annformer.scgpt import ScGPT
from annformer.tokenizer import TokenizerSettings
from annformer.tokens import CellBatch
from annformer.vocab import GeneVocab


class How(TypedDict):
    """How cells are embedded."""

    embedding: str | None
    """Name in obsm of an embedding to use; None: embed."""
    progress: bool | None
    """Show a progress bar; None: when stderr is a terminal."""


class Cells(NamedTuple):
    """Where cells come from, and how they are embedded."""

    data: AnnData | str | Path
    source: AnnDataSource
    """That reads `data`."""
    model: ScGPT
    embedding: str | None
    progress: bool | None


class Chosen:
    """Some of the cells of a source, as a source."""

    def __init__(self, source: AnnDataSource, rows: Int[np.ndarray, "cell"]) -> None:
        self._source, self._rows = source, rows

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return len(self._rows)

    @property
    def obs_names(self) -> np.ndarray:
        """Name of every cell, in order."""
        return self._source.obs_names[self._rows]

    def match(self, vocab: GeneVocab) -> GeneMatch:
        """Find the source's columns in `vocab`."""
        return self._source.match(vocab)

    def batches(
        self,
        size: int,
        *,
        vocab: GeneVocab,
        label_keys: Mapping[str, str] | None = None,
        rows: Int[np.ndarray, "cell"] | None = None,
        start: int = 0,
    ) -> Iterator[CellBatch]:
        """Yield the chosen cells in order."""
        chosen = self._rows if rows is None else self._rows[rows]
        return self._source.batches(size, vocab=vocab, label_keys=label_keys, rows=chosen, start=start)


class MadeBy(Protocol):
    """What an embedding is made by."""

    @property
    def model(self) -> str:
        """Its name, for messages."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the model."""
        ...

    @property
    def tokenizer(self) -> TokenizerSettings:
        """How cells became tokens."""
        ...


def given_embedding(data: AnnData | str | Path, key: str, settings: MadeBy) -> Float32[np.ndarray, "cell width"]:
    """Read `obsm[key]`, which `embed` wrote by the same model with the same settings.

    Raises
    ------
    InputError
        When it is not there, or was made in another way.
    """
    rows, record = _kept(data, key)
    here = "what embed wrote: obsm[key] and its record in uns"
    if rows is None or not isinstance(record, Mapping) or "fingerprint" not in record:
        what = "there is no" if rows is None else "annformer did not write"
        found = f"{what} obsm[{key!r}] in {data if isinstance(data, str | Path) else 'your AnnData'}"
        raise input_error(found, here, "embed the cells first, or leave embedding (--embedding) out")
    theirs = settings.fingerprint, settings.tokenizer
    ours = str(record["fingerprint"]), _settings(record.get("settings", {}))
    if ours != theirs:
        found = f"obsm[{key!r}] was made by {_described(str(record.get('model')), *ours, theirs)}"
        expected = f"an embedding by the same as the reference, {_described(settings.model, *theirs, ours)}"
        remedy = "leave embedding (--embedding) out, and the cells are embedded anew; or embed them with the model of the reference"
        raise input_error(found, expected, remedy)
    return np.asarray(rows, np.float32)


def _kept(data: AnnData | str | Path, key: str) -> tuple[Any, Any]:
    """`obsm[key]` and its record, None where there is none."""
    if isinstance(data, AnnData):
        records = data.uns.get("annformer")
        return data.obsm.get(key), records.get(key) if isinstance(records, Mapping) else None
    path = Path(data).expanduser()
    if path.is_file():
        with h5py.File(path, "r") as root:
            return _read(root, key)
    is_store = any((path / name).is_file() for name in ("zarr.json", ".zgroup"))
    return _read(zarr.open_group(str(path), mode="r"), key) if is_store else (None, None)


def _read(root: Any, key: str) -> tuple[Any, Any]:
    places = f"obsm/{key}", f"uns/annformer/{key}"
    rows, record = (read_elem(root[place]) if place in root else None for place in places)
    return rows, record


def _settings(record: Mapping[str, Any]) -> TokenizerSettings:
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in record.items()}
    return TokenizerSettings.read(plain, where="the record of the embedding in uns")


def _described(model: str, fingerprint: str, settings: TokenizerSettings, other: tuple[str, TokenizerSettings]) -> str:
    """Name a model and the settings in which it differs from another."""
    theirs = other[1].model_dump()
    differing = [f"{name} {value!r}" for name, value in settings.model_dump().items() if value != theirs[name]]
    return " with ".join([f"{model} ({fingerprint[:8]})", *([", ".join(differing)] if differing else [])])
