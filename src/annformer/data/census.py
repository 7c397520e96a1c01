"""SomaStudy: cells of a TileDB-SOMA experiment or of the CELLxGENE Census, chosen by a filter over obs.

In memory are the number and the labels of every chosen cell (50 bytes at the peak, while a label is read; 33 million cells: 1.7 GB) and one
block of cells: X is read by runs of cells. What is written below about the Census holds for every experiment with its columns, such as a
copy of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Int

from annformer.data.collapse import Rows
from annformer.data.formats import Container, Matrix
from annformer.data.readers import SAMPLE_VALUES
from annformer.data.studies import FileCells, Study, StudyCells
from annformer.data.tables import FrameTable, unknown_name
from annformer.errors import input_error

logger = logging.getLogger(__name__)

CENSUS: Final = "census:"
GENE_NAMES: Final = ("feature_name", "var_id")
"""Columns of var that are taken for the names of the genes: the Census's, and what tiledbsoma makes of the index of an AnnData."""
STANDS_FOR: Final = {"study": "dataset_id", "batch": "donor_id"}
"""Label columns, and the columns of the Census that say the same."""
PRIMARY: Final = "is_primary_data"
"""Column of the Census that is False for what another of its data sets holds as well."""
JOINID: Final = "soma_joinid"
BLOCK_VALUES: Final = 2**22
"""Values read at a time: about 2,000 cells, the height of a tile of the Census; 0.2 GB with the copy by rows."""
MAX_BLOCK_ROWS: Final = 2**16
TABLE_SPAN: Final = 2**22
"""Numbers up to so far apart are looked up in a table, which is five times as fast as searching."""
CONFIG: Final = {
    "soma.init_buffer_bytes": str(2**25),
    "sm.mem.total_budget": str(2**29),
    "sm.query.sparse_global_order.preprocess_tile_merge": "0",
}
"""By default tiledbsoma takes 1 GB for every column and 10 GB for its tiles. And TileDB 2.30 merges the order of tiles in tasks that may
outlive their query and then crash the process (github.com/TileDB-Inc/TileDB/pull/5723): it is not to."""


class SomaStudy(Study):
    """Cells of one SOMA experiment."""

    path: str
    """Folder or address (`s3://...`) of an experiment; `census:RELEASE` or `census:RELEASE/ORGANISM`, with a date or `stable`."""
    layer: str | None = "raw"
    """Layer of X with the counts."""
    measurement: str = "RNA"
    """Measurement that is read."""
    obs_filter: str | None = None
    """Condition on columns of obs; None: all cells. Where obs has `is_primary_data`, only primary cells are taken unless it is named."""

    @property
    def name(self) -> str:
        """Address, or name of the folder."""
        return Path(self.path).name if _is_folder(self.path) else self.path

    def _reader(self) -> Callable[..., StudyCells]:
        return partial(_SomaCells, _open(self))

    def files(self) -> list[Path]:
        """The files that it consists of; none if it does not lie on this disk."""
        return super().files() if _is_folder(self.path) else []

    def sha256(self) -> str:
        """Hash of what was asked and which cells and genes that are; values are not read for it."""
        return self._taken.sha256

    def identity(self) -> dict[str, object]:
        """Tell it from other data, or from itself after a change."""
        changed = max((file.stat().st_mtime_ns for file in self.files()), default=0)
        return self.model_dump() | {"taken": self.sha256(), "bytes": self.n_bytes(), "changed": changed}

    def record(self) -> dict[str, object]:
        """What a manifest says about it: with the release of the Census and the filter in force."""
        return super().record() | {"file": self._taken.name, "obs_filter": self._taken.obs_filter}

    @cached_property
    def _taken(self) -> _Taken:
        container = _open(self)
        assert isinstance(container.obs, _CellTable)
        numbers, condition = container.obs.names, container.obs.condition
        genes, where = container.var.names.tolist(), f"layers[{self.layer!r}]"
        n_values = container.matrices[where].open().n_values if where in container.matrices else 0
        asked = json.dumps([container.name, self.measurement, self.layer, condition, genes, n_values])
        container.close()
        return _Taken(container.name, condition, hashlib.sha256(asked.encode() + numbers.astype("<i8").tobytes()).hexdigest())


class _Taken(NamedTuple):
    """What a study turned out to be."""

    name: str
    obs_filter: str | None
    sha256: str


class _SomaCells(FileCells):
    def numbers(self, rows: Int[np.ndarray, "cell"]) -> Int[np.ndarray, "cell"]:
        return self.obs_names[rows]

    def _warn_doubles(self) -> None:
        """Numbers of cells are unique."""


def is_soma(path: str) -> bool:
    """Whether a path is that of an experiment, of a folder like one, or of the Census."""
    return path.startswith(CENSUS) or "://" in path or _is_folder(path)


def _is_folder(path: str) -> bool:
    return (Path(path) / "__tiledb_group.tdb").is_file()


def _imported(package: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        found = f"the package {error.name} is not installed"
        raise input_error(found, "the extra annformer[census], which reads TileDB-SOMA", 'pip install "annformer[census]"') from error


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Say which experiment could not be read: the fault of a disk or a connection, so the work done is kept."""
    try:
        yield
    except (_imported("tiledbsoma").SOMAError, RuntimeError) as error:
        raise OSError(errno.EIO, _first_line(error), name) from error


def _first_line(error: Exception) -> str:
    line = str(error).removeprefix("SOMAError: ").strip().partition("\n")[0].rstrip(".")
    return line.strip("'") if line.startswith("'") else line


@dataclass(frozen=True)
class _Experiment(Container):
    def reading(self, what: str = "") -> AbstractContextManager[None]:
        return _reading(f"{what} of {self.name}" if what else self.name)


def _open(study: SomaStudy) -> Container:
    name, uri, context = _place(study.path)
    with _reading(name):
        experiment = _experiment(name, uri, context)
        try:
            return _look(study, name, experiment)
        except BaseException:
            experiment.close()
            raise


def _place(path: str) -> tuple[str, str, Any]:
    """Name, address and settings of an experiment."""
    soma = _imported("tiledbsoma")
    if not path.startswith(CENSUS):
        return path, str(Path(path).resolve()) if _is_folder(path) else path, soma.SOMATileDBContext(tiledb_config=CONFIG)
    version, _, organism = path.removeprefix(CENSUS).partition("/")
    date, uri, region = _release(version or "stable")
    organism = organism or "homo_sapiens"
    context = _imported("cellxgene_census").get_default_soma_context(tiledb_config=CONFIG | {"vfs.s3.region": region})
    return f"{CENSUS}{date}/{organism}", f"{uri.rstrip('/')}/census_data/{organism}", context


@lru_cache
def _release(version: str) -> tuple[str, str, str]:
    """Date, address and region of a release of the Census."""
    census = _imported("cellxgene_census")
    try:
        found = census.get_census_version_description(version)
    except ValueError:
        msg = f"the Census has no release {version!r}"
        raise input_error(msg, "a date such as 2025-01-30, stable or latest", "choose a release from the Census's web page") from None
    except OSError as error:
        msg = f"the list of releases of the Census cannot be read ({type(error).__name__})"
        raise input_error(msg, "a connection to the internet", "connect, or give the folder of a copy") from error
    return found["release_build"], found["soma"]["uri"], found["soma"]["s3_region"]


def _experiment(name: str, uri: str, context: Any) -> Any:
    soma = _imported("tiledbsoma")
    try:
        found = soma.open(uri, context=context)
    except soma.DoesNotExistError:
        msg = f"there is no TileDB-SOMA experiment at {name}"
        raise input_error(msg, "its folder, its address or census:RELEASE/ORGANISM", "check the spelling") from None
    if isinstance(found, soma.Experiment):
        return found
    holds = f"; it holds {', '.join(found)}" if isinstance(found, soma.Collection) else ""
    found.close()
    msg = f"{name} is a SOMA {type(found).__name__}, not an experiment{holds}"
    raise input_error(msg, "an experiment", "give its folder, in a copy of the Census census_data/homo_sapiens")


def _look(study: SomaStudy, name: str, experiment: Any) -> Container:
    logger.info("%s: looking for the cells", name)
    if study.measurement not in experiment.ms:
        found = f"{name} has no measurement {study.measurement!r}"
        raise unknown_name(found, study.measurement, list(experiment.ms), "one of", "measurement")
    measurement = experiment.ms[study.measurement]
    obs = _CellTable(experiment.obs, study.obs_filter, name)
    var, genes = _gene_table(measurement.var)
    layers = measurement.X if "X" in measurement else {}
    share = len(obs.names) / max(1, experiment.obs.count)
    matrices = {f"layers[{layer!r}]": Matrix(partial(_rows_of, layers, layer, obs.names, genes, share), var) for layer in layers}
    return _Experiment("TileDB-SOMA", name, obs, var, matrices, close=experiment.close)


def _gene_table(frame: Any) -> tuple[FrameTable, Int[np.ndarray, "gene"]]:
    """Table of the genes, and their numbers in X."""
    table = frame.read().concat().to_pandas().sort_values(JOINID)
    numbers = table.pop(JOINID).to_numpy()
    key = next((key for key in GENE_NAMES if key in table.columns), None)
    names = pd.Index(numbers.astype(str)) if key is None else pd.Index(table[key])
    return FrameTable(table.set_axis(names, axis=0)), numbers


def _rows_of(layers: Any, layer: str, cells: Int[np.ndarray, "cell"], genes: Int[np.ndarray, "gene"], share: float) -> _ExperimentRows:
    return _ExperimentRows(layers[layer], cells, genes, round(layers[layer].nnz * share))


class _CellTable:
    """Columns of obs, one read at a time, of the cells that fulfil a condition, in the order of their numbers."""

    def __init__(self, frame: Any, obs_filter: str | None, name: str) -> None:
        self._frame, self._name = frame, name
        self._stored = [column for column in frame.schema.names if not column.startswith("soma_")]
        wanted = [f"({obs_filter})"] if obs_filter else []
        if PRIMARY in self._stored and not re.search(rf"\b{PRIMARY}\b", obs_filter or ""):
            wanted.append(f"{PRIMARY} == True")
        self.condition = " and ".join(wanted) or None
        """What the cells fulfil."""
        self.columns = self._stored + [name for name, other in STANDS_FOR.items() if name not in self._stored and other in self._stored]
        """Names of the columns."""

    @cached_property
    def names(self) -> np.ndarray:
        """Numbers of the cells, `soma_joinid`: text would take ten times the memory."""
        numbers = np.sort(self._read([])[JOINID].to_numpy())
        if len(numbers) == 0:
            found = f"no cell of {self._name} fulfils the filter {self.condition!r}" if self.condition else f"{self._name} has no cells"
            raise input_error(found, "at least one cell", "compare the filter with the values in obs; capital letters count")
        return numbers

    def column(self, name: str) -> pd.Series:
        """Read one column."""
        table = self._read([name if name in self._stored else STANDS_FOR[name]])
        numbers, values = table[JOINID].to_numpy(), table.column(1).to_pandas()
        if not np.array_equal(numbers, self.names):
            values = values.iloc[np.argsort(numbers)]
        return values.reset_index(drop=True)

    def _read(self, columns: list[str]) -> pa.Table:
        """Read columns and the numbers of the cells; text as codes, page by page."""
        names = [JOINID, *columns]
        try:
            pages = self._frame.read(column_names=names, value_filter=self.condition)
        except _imported("tiledbsoma").SOMAError as error:
            found = f"the filter {self.condition!r} of the cells of {self._name} cannot be used: {_first_line(error)}"
            expected = f"conditions such as tissue == 'lung', with `and` and `or` between them, on {', '.join(self._stored)}"
            raise input_error(found, expected, "correct obs_filter; text stands in quotes") from None
        coded = [_coded(page.select(names)) for page in pages]
        return pa.concat_tables(coded).unify_dictionaries()


def _coded(page: pa.Table) -> pa.Table:
    for at, column in enumerate(page.schema):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            page = page.set_column(at, column.name, page.column(at).dictionary_encode())
    return page


class _ExperimentRows:
    """A layer of X of which rows can be read: the row reader of an experiment."""

    stored = "by rows"

    def __init__(self, array: Any, cells: Int[np.ndarray, "cell"], genes: Int[np.ndarray, "gene"], n_values: int) -> None:
        self.shape = (len(cells), len(genes))
        self.n_values = n_values
        """About how many values these cells have: their share of all."""
        self.dtype = np.dtype(array.schema.field("soma_data").type.to_pandas_dtype())
        self._array, self._cells, self._genes = array, cells, genes

    @property
    def rows_at_once(self) -> int:
        """Rows that are best read together."""
        return max(1, min(MAX_BLOCK_ROWS, BLOCK_VALUES * self.shape[0] // max(1, self.n_values)))

    def read(self, start: int, stop: int) -> Rows:
        """Read rows `start` to `stop`."""
        cells = self._cells[start:stop]
        gapless = cells[-1] - cells[0] == len(cells) - 1
        where = slice(int(cells[0]), int(cells[-1])) if gapless else pa.array(cells)  # the end of this slice counts
        rows, columns, values = [np.empty(0, np.uint16)], [np.empty(0, np.int32)], [np.empty(0, self.dtype)]
        for page in self._array.read((where,)).tables():
            rows.append(_places(page["soma_dim_0"].to_numpy(), cells).astype(np.uint16))
            columns.append(_places(page["soma_dim_1"].to_numpy(), self._genes))
            values.append(page["soma_data"].to_numpy())
        row = np.concatenate(rows)
        order = np.argsort(row, kind="stable")  # of 16 bits: by radix
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(cells)))])
        return Rows(indptr, np.concatenate(columns)[order], np.concatenate(values)[order])

    def sample(self) -> np.ndarray:
        """Some stored values."""
        n = max(1, SAMPLE_VALUES * self.shape[0] // max(1, self.n_values))
        starts = {0} if self.shape[0] <= 3 * n else {0, self.shape[0] // 2, self.shape[0] - n}
        size = min(self.shape[0], 3 * n, MAX_BLOCK_ROWS) if len(starts) == 1 else min(n, MAX_BLOCK_ROWS)
        return np.concatenate([self.read(start, start + size).data for start in sorted(starts)])


def _places(numbers: Int[np.ndarray, "value"], known: Int[np.ndarray, "known"]) -> Int[np.ndarray, "value"]:
    """Place of every number among the known ones, which ascend; -1 where it is none of them and they lie close together."""
    first, span = known[0], int(known[-1] - known[0]) + 1
    if span > TABLE_SPAN:
        return np.searchsorted(known, numbers).astype(np.int32)
    table = np.full(span, -1, dtype=np.int32)
    table[known - first] = np.arange(len(known))
    return table[numbers - first]
