"""Studies: the data sets that a corpus is made of, what is said about their cells, how they are opened."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import pandas as pd
from jaxtyping import Int, Integer
from pydantic import Field

from annformer.config import Config
from annformer.data.anndata import AnnDataSource
from annformer.data.counts import CountsChoice
from annformer.data.source import CellSource
from annformer.data.store_manifest import FileRecord
from annformer.data.tables import Table, as_text
from annformer.genes import read_orthologs

UNKNOWN: Final = "unknown"


class StudyCells(CellSource, Protocol):
    """What a corpus needs to know of a data set beside its cells."""

    counts: CountsChoice

    @property
    def n_values(self) -> int:
        """About how many non-zero values there are."""
        ...

    @property
    def obs(self) -> Table:
        """Table of the cells."""
        ...

    def numbers(self, rows: Int[np.ndarray, "cell"]) -> Int[np.ndarray, "cell"]:
        """What the cells in these rows are called where they come from, as numbers."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class Study(Config):
    """One data set of a corpus."""

    path: str
    """An .h5ad or 10x .h5 file, a .zarr folder, or a 10x folder with matrix.mtx."""
    gene_key: str | None = None
    """Column of var with the gene names; None: the names of var."""
    layer: str | None = None
    """Layer with the counts; None: found out."""
    orthologs: str | None = None
    """Table of two columns for other species: names there, human names."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that hold for all its cells (study, tissue, assay ...); they win over columns of obs."""

    @property
    def name(self) -> str:
        """File name, as it stands in the manifest."""
        return Path(self.path).name

    def open(self, *, min_match: float = 0.1) -> StudyCells:
        """Open it; reads nothing but the tables, and of an experiment a sample of its values.

        Parameters
        ----------
        min_match
            Refuse it when a smaller share of its columns is known to a vocabulary.
        """
        orthologs = None if self.orthologs is None else read_orthologs(self.orthologs)
        return self._reader()(gene_key=self.gene_key, layer=self.layer, orthologs=orthologs, min_match=min_match)

    def _reader(self) -> Callable[..., StudyCells]:
        """What opens it, without how the cells are to be read."""
        return partial(FileCells, self.path)

    def files(self) -> list[Path]:
        """The files that it consists of."""
        path = Path(self.path)
        return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())

    def n_bytes(self) -> int:
        """Size on disk."""
        return sum(file.stat().st_size for file in self.files())

    def sha256(self) -> str:
        """Hash of the file, or of the names and hashes of the files of a folder."""
        path, files = Path(self.path), self.files()
        if files == [path]:
            return file_sha256(path)
        lines = [f"{file_sha256(file)} {file.relative_to(path).as_posix()}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def identity(self) -> dict[str, object]:
        """Tell it from other data, or from itself after a change, without reading it."""
        changed = max(file.stat().st_mtime_ns for file in self.files())
        return self.model_dump() | {"bytes": self.n_bytes(), "changed": changed}

    def record(self) -> dict[str, object]:
        """What a manifest says about it."""
        return {"file": self.name, "n_bytes": self.n_bytes(), "sha256": self.sha256()}


class FileCells(AnnDataSource):
    """Cells of a file."""

    @property
    def n_values(self) -> int:
        """About how many non-zero values there are."""
        if self.reader.stored != "dense":
            return self.reader.n_values
        sample = self.reader.sample()
        return int(self.reader.n_values * np.count_nonzero(sample) / max(1, sample.size))

    @property
    def obs(self) -> Table:
        """Table of the cells."""
        return self.container.obs

    def numbers(self, rows: Int[np.ndarray, "cell"]) -> Int[np.ndarray, "cell"]:
        """Rows of a file are called by their places."""
        return rows


class LabelCodes:
    """Codes of the texts of one label column, given out in the order in which the texts are met."""

    def __init__(self, categories: Sequence[str] = ()) -> None:
        self.code = {text: number for number, text in enumerate(categories)}

    @property
    def categories(self) -> list[str]:
        """The text of every code."""
        return list(self.code)

    def of_study(self, study: Study, cells: StudyCells, column: str, default: str = UNKNOWN) -> Integer[np.ndarray, "cell"]:
        """Code of every cell: from the study's labels, else from obs, else the default; in as few bytes as they fit in."""
        if column in study.labels or column not in cells.obs.columns:
            return np.broadcast_to(np.int32(self._code(study.labels.get(column, default))), cells.n_obs)
        place, values = pd.factorize(cells.obs.column(column))
        texts = [*as_text(values).tolist(), *([""] if (place < 0).any() else [])]  # a cell without a value has the place -1
        codes = {text: self._code(text or default) for text in sorted(set(texts))}
        table = np.array([codes[text] for text in texts])
        return table.astype(np.min_scalar_type(table.max(initial=0)))[place]

    def _code(self, text: str) -> int:
        return self.code.setdefault(text, len(self.code))


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file that stands beside the shards of a store."""
    return FileRecord(file=path.name, n_bytes=path.stat().st_size, sha256=file_sha256(path))


def file_sha256(path: Path) -> str:
    """Hash the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
