"""Studies: which data sets a corpus is made of, what is said about their cells, how they are opened."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from jaxtyping import Int
from pydantic import Field

from annformer.config import Config
from annformer.data.anndata import AnnDataSource
from annformer.data.counts import CountsChoice
from annformer.data.source import CellSource
from annformer.data.tables import Table, as_text
from annformer.errors import input_error
from annformer.genes import read_orthologs

UNKNOWN: Final = "unknown"
SETTINGS: Final = ("path", "gene_key", "layer", "orthologs")
"""Columns of a table of studies that are not labels of the cells."""
_ZARR: Final = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")


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
        """Open it; reads nothing but the tables.

        Parameters
        ----------
        min_match
            Refuse it when a smaller share of its columns is known to a vocabulary.
        """
        orthologs = None if self.orthologs is None else read_orthologs(self.orthologs)
        return _FileCells(self.path, gene_key=self.gene_key, layer=self.layer, orthologs=orthologs, min_match=min_match)

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


class _FileCells(AnnDataSource):
    @property
    def n_values(self) -> int:
        if self.reader.stored != "dense":
            return self.reader.n_values
        sample = self.reader.sample()
        return int(self.reader.n_values * np.count_nonzero(sample) / max(1, sample.size))

    @property
    def obs(self) -> Table:
        return self.container.obs


class LabelCodes:
    """Codes of the texts of one label column, given out in the order in which the texts are met."""

    def __init__(self, categories: Sequence[str] = ()) -> None:
        self.code = {text: number for number, text in enumerate(categories)}

    @property
    def categories(self) -> list[str]:
        """The text of every code."""
        return list(self.code)

    def of_study(self, study: Study, cells: StudyCells, column: str, default: str = UNKNOWN) -> Int[np.ndarray, "cell"]:
        """Code of every cell: from the study's labels, else from obs, else the default."""
        if column in study.labels or column not in cells.obs.columns:
            return np.full(cells.n_obs, self._code(study.labels.get(column, default)), dtype=np.int32)
        texts, place = np.unique(as_text(cells.obs.column(column)).astype(str), return_inverse=True)
        return np.array([self._code(str(text) or default) for text in texts], dtype=np.int32)[place]

    def _code(self, text: str) -> int:
        return self.code.setdefault(text, len(self.code))


def file_sha256(path: Path) -> str:
    """Hash the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_studies(sources: Sequence[str | Path | Study]) -> list[Study]:
    """List the data sets that `sources` stand for.

    Parameters
    ----------
    sources
        Studies, or paths: of data sets, of folders that hold data sets at any depth, and of tables of studies: `.tsv` or `.csv` with a
        column `path` (relative to the table) and any of `gene_key`, `layer`, `orthologs`; every other column is a label of all cells of
        the study. Folders are searched in alphabetical order.
    """
    found: list[Study] = []
    for source in sources:
        found += [source] if isinstance(source, Study) else _at(Path(source).expanduser())
    times = Counter(str(Path(study.path).resolve()) for study in found)
    doubles = [path for path, n in times.items() if n > 1]
    if doubles:
        msg = f"{len(doubles)} data sets are named more than once: {', '.join(doubles[:3])}"
        raise input_error(msg, "every data set once", "leave out one of them")
    return found


def _at(path: Path) -> Iterator[Study]:
    if path.suffix in (".tsv", ".csv") and path.is_file():
        yield from _of_table(path)
    elif path.is_dir() and not _is_data(path):
        inside = [Study(path=str(data)) for data in _inside(path)]
        if not inside:
            msg = f"the folder {path} holds no cells"
            raise input_error(msg, ".h5ad, .h5, .zarr or 10x mtx folders in it", "give the folder that holds them")
        yield from inside
    else:
        yield Study(path=str(path))


def _inside(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from (path,) if _is_data(path) else _inside(path)
        elif path.suffix in (".h5ad", ".h5"):
            yield path


def _is_data(folder: Path) -> bool:
    return any((folder / name).exists() for name in _ZARR) or any(folder.glob("*matrix.mtx*"))


def _of_table(table: Path) -> Iterator[Study]:
    with table.open(encoding="utf-8-sig", newline="") as stream:
        lines = list(csv.DictReader(stream, delimiter="\t" if table.suffix == ".tsv" else ","))
    if not lines or "path" not in lines[0]:
        msg = f"{table} is no table of studies: " + ("it has no column 'path'" if lines else "it has no line below the header")
        raise input_error(msg, "a header with 'path' and a line for every study", "correct the table")
    for number, line in enumerate(lines, start=2):
        values = {key: value.strip() for key, value in line.items() if isinstance(value, str) and value.strip()}
        if "path" not in values or None in line:
            msg = f"line {number} of {table} does not fit its header"
            raise input_error(msg, "a path, and as many columns as the header", "correct the line")
        labels = {key: value for key, value in values.items() if key not in SETTINGS}
        settings = {key: value for key, value in values.items() if key in SETTINGS}
        for key in ("path", "orthologs"):
            if key in settings:
                settings[key] = str(table.parent / Path(settings[key]).expanduser())
        yield Study.read(settings | {"labels": labels}, where=f"line {number} of {table}")


def study_names(studies: Sequence[Study]) -> list[str]:
    """Name of each study's file, with as many folders before it as tell it from the others."""
    parts = [(*Path(study.path).resolve().parts[1:-1], Path(study.path).stem) for study in studies]
    names = []
    for own in parts:
        depth = next(n for n in range(1, len(own) + 1) if n == len(own) or [other[-n:] for other in parts].count(own[-n:]) == 1)
        names.append("/".join(own[-depth:]))
    return names
