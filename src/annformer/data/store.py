"""The on-disk corpus for pretraining: memory-mapped Arrow shards of shuffled cells, read at random through views.

A store is a folder: `manifest.json`, `vocab.json`, `genes.tsv`, `measured.npy` and shards, each an Arrow IPC stream with a row for every
cell: `gene_ids` (ascending ids of `vocab.json`), `counts`, a code for every label column (what it stands for is in the manifest), and where
the cell came from (`source`, `row`). `store_writer.write_store` makes it; `datasets.load_dataset("arrow", data_files="STORE/*.arrow")`
opens it too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from annformer.data.collapse import Rows, collapse
from annformer.data.measured import read_measured
from annformer.data.store_manifest import FileRecord, Shard, StoreManifest
from annformer.data.studies import file_sha256
from annformer.data.tables import unknown_name
from annformer.errors import InputError, input_error
from annformer.genes import GeneMatch, match_genes
from annformer.kernels import jit
from annformer.tokens import CellBatch, Measured
from annformer.vocab import GeneVocab

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
VOCAB: Final = "vocab.json"
OWN_COLUMNS: Final = ("gene_ids", "counts", "source", "row")
"""Columns of a shard that are not labels."""


class _Part(NamedTuple):
    """A record batch as views of the mapped file."""

    offsets: Int[np.ndarray, "cell+1"]
    gene_ids: Int[np.ndarray, "value"]
    counts: Float[np.ndarray, "value"]
    codes: dict[str, Int[np.ndarray, "cell"]]
    """Of every label column, `source` and `row`."""


class _Slots(NamedTuple):
    """The genes of a store over another vocabulary."""

    slots: Int[np.ndarray, "token"]
    """For every id of the store its place among the genes that the vocabulary has, or -1."""
    gene_ids: Int[np.ndarray, "gene"]
    """Ids of these genes in the vocabulary."""
    in_order: bool
    """Every slot has one gene of the store, and these stand in the order of their slots."""


class StoreSource:
    """Cells of a store, in any order, at the speed of copying them.

    Opening compares the sizes of the files with the manifest; `verify` compares their hashes. Memory-mapped: processes that open the same
    store share its pages. Can be pickled.

    Parameters
    ----------
    path
        Folder that `write_store` made.

    Attributes
    ----------
    vocab
        Genes of the store and the special tokens.
    categories
        For every role in a `label_keys` that was used, the category that each code stands for.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.manifest = _read_manifest(self.path)
        self.vocab = GeneVocab.from_json(self.path / VOCAB)
        self.categories: dict[str, tuple[str, ...]] = {}
        _require_sizes(self.path, self._files)
        mapped = {shard.file: _open_shard(self.path / shard.file, list(self.manifest.columns)) for shard in self.manifest.shards}
        self._parts = [part for shard in self.manifest.shards for part in mapped[shard.file]]
        self._starts = np.cumsum([0, *(len(part.offsets) - 1 for part in self._parts)])
        found, told = int(self._starts[-1]), self.manifest.n_cells
        if found != told:
            raise _damaged(self.path, f"its shards hold {found:,} cells, its manifest says {told:,}")
        self._tables: dict[GeneVocab, _Slots] = {}
        self._measured: dict[GeneVocab, np.ndarray | None] = {}

    def __reduce__(self) -> tuple[type[StoreSource], tuple[Path]]:
        return StoreSource, (self.path,)

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return int(self._starts[-1])

    @cached_property
    def lengths(self) -> Int[np.ndarray, "cell"]:
        """Expressed genes of every cell."""
        return np.concatenate([np.diff(part.offsets) for part in self._parts])

    def lengths_over(self, vocab: GeneVocab) -> Int[np.ndarray, "cell"]:
        """Expressed genes of every cell that `vocab` has, counted by going through the store once."""
        slots, gene_ids, _ = self._slots(vocab)
        return np.concatenate([_distinct(part.offsets, part.gene_ids, slots, len(gene_ids)) for part in self._parts])

    def n_measured_over(self, vocab: GeneVocab) -> Int[np.ndarray, "cell"]:
        """Genes that `vocab` has and that the source of the cell measured, of every cell."""
        genes = self._measured_over(vocab)
        if genes is None:
            return np.full(self.n_obs, len(self.rows([], vocab=vocab).gene_ids))
        return np.count_nonzero(genes, axis=1)[self.codes("source")]

    def require_measured(self) -> None:
        """Refuse a store that cannot tell which genes a cell's source measured: its zeros would be false.

        Raises
        ------
        InputError
            When it holds several sources and was made before this was written down.
        """
        if self.manifest.measured is None and len(self.manifest.sources) > 1:
            found = f"zeros are asked for, and the store {self.path} does not say which genes each of its sources measured"
            raise input_error(found, "a store of this version", "make it again with `annformer prepare`, or set tokenizer.zeros to 0")

    @cached_property
    def obs_names(self) -> np.ndarray:
        """Name of every cell: its study and its row there."""
        return np.array(self.names(np.arange(self.n_obs)), dtype=object)

    def names(self, rows: Sequence[int] | Int[np.ndarray, "cell"]) -> list[str]:
        """Where cells came from, for messages: file and row in it."""
        sources, where = self.codes("source", rows), self.codes("row", rows)
        return [f"{self.manifest.sources[source].file}:{row}" for source, row in zip(sources, where, strict=True)]

    def codes(self, column: str, rows: Sequence[int] | Int[np.ndarray, "cell"] | None = None) -> Int[np.ndarray, "cell"]:
        """Integer codes of a label column (or `source`, `row`), of all cells or of some."""
        if column not in (*self.manifest.columns, "source", "row"):
            found = f"the store {self.path} has no column {column!r}"
            raise unknown_name(found, column, list(self.manifest.columns), "one of", "the column")
        if rows is None:
            return np.concatenate([part.codes[column] for part in self._parts]).astype(np.int64)
        places = self._places(np.asarray(rows, dtype=np.int64))
        return np.array([self._parts[part].codes[column][row] for part, row in places], dtype=np.int64)

    def match(self, vocab: GeneVocab) -> GeneMatch:
        """Find the genes of the store in `vocab`; refuses when too few are found."""
        match = match_genes(self.vocab.genes, vocab)
        match.require()
        return match

    def rows(
        self,
        rows: Sequence[int] | Int[np.ndarray, "cell"],
        *,
        vocab: GeneVocab | None = None,
        label_keys: Mapping[str, str] | None = None,
    ) -> CellBatch:
        """Read the given cells, in this order; the batch says which genes the source of each measured, where sources differ in that.

        Parameters
        ----------
        vocab
            Vocabulary whose ids the batch carries; None, and fastest: the store's own.
        label_keys
            For each role (`batch`, `cell_type`, ...) the column whose codes go into `labels`; see `categories`.
        """
        wanted, vocab = np.asarray(rows, dtype=np.int64), self.vocab if vocab is None else vocab
        ids, counts, sources = [], [], []
        for number, row in self._places(wanted):
            part = self._parts[number]
            sources.append(part.codes["source"][row])
            begin, end = part.offsets[row], part.offsets[row + 1]
            ids.append(part.gene_ids[begin:end])
            counts.append(part.counts[begin:end])
        indptr = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum([len(values) for values in counts], out=indptr[1:])
        assert indptr[-1] < 2**31, "a batch holds fewer than 2**31 values"
        stored = Rows(indptr.astype(np.int32), _joined(ids, np.int32), _joined(counts, np.float32))
        cells, gene_ids = self._over(stored, vocab)
        labels = {}
        for role, column in (label_keys or {}).items():
            labels[role] = self.codes(column, wanted)
            self.categories[role] = tuple(self.manifest.columns[column])
        genes = self._measured_over(vocab)
        measured = None if genes is None else Measured(genes, np.array(sources, dtype=np.int64))
        return CellBatch(cells, gene_ids, wanted, labels, measured)

    def batches(
        self,
        size: int,
        *,
        vocab: GeneVocab,
        label_keys: Mapping[str, str] | None = None,
        rows: Int[np.ndarray, "cell"] | None = None,
        start: int = 0,
    ) -> Iterator[CellBatch]:
        """Yield cells `size` at a time, as every `CellSource` does; any order of `rows` is fast."""
        assert size >= 1, "a batch has at least one cell"
        wanted = (np.arange(self.n_obs) if rows is None else np.asarray(rows, dtype=np.int64))[start:]
        for first in range(0, len(wanted), size):
            yield self.rows(wanted[first : first + size], vocab=vocab, label_keys=label_keys)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compare every file that is read with its hash; do so before a long run.

        Parameters
        ----------
        progress
            Called with the bytes read and their total.

        Raises
        ------
        InputError
            Naming every file that is not what was written.
        """
        bad, done = [], 0
        files = {file.file: file for file in self._files}
        total = sum(file.n_bytes for file in files.values())
        for file in files.values():
            if file_sha256(self.path / file.file) != file.sha256:
                bad.append(file.file)
            done += file.n_bytes
            if progress is not None:
                progress(done, total)
        if bad:
            raise _damaged(self.path, f"{len(bad)} of its {len(files)} files are not what was written: {', '.join(bad)}")

    @property
    def _files(self) -> list[Shard | FileRecord]:
        """Files whose size and hash the manifest has."""
        return [*self.manifest.shards, *(file for file in (self.manifest.measured, self.manifest.vocab) if file is not None)]

    def _places(self, rows: Int[np.ndarray, "cell"]) -> Iterator[tuple[int, int]]:
        """Part of every cell, and its row there."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.n_obs):
            msg = f"rows from {rows.min()} to {rows.max()} of a store of {self.n_obs} cells"
            raise IndexError(msg)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        return zip(parts.tolist(), (rows - self._starts[parts]).tolist(), strict=True)

    def _over(self, stored: Rows, vocab: GeneVocab) -> tuple[csr_array, Int[np.ndarray, "gene"]]:
        if self._is_own(vocab):
            counts, gene_ids = stored, np.arange(len(self.vocab.genes))
        else:
            slots, gene_ids, in_order = self._slots(vocab)
            if in_order:  # genes are left out, and no others change places: nothing to sort or to add up
                counts = Rows(*_without(stored.indptr, stored.indices, stored.data, slots))
            else:
                changed = collapse(stored, slots, len(gene_ids))
                counts = Rows(changed.indptr, changed.indices, changed.data)
        cells = csr_array((counts.data, counts.indices, counts.indptr), shape=(len(counts.indptr) - 1, len(gene_ids)))
        cells.has_canonical_format = True
        return cells, gene_ids

    def _is_own(self, vocab: GeneVocab) -> bool:
        """Whether what is stored is what a batch holds."""
        return self._genes_first and (vocab is self.vocab or vocab == self.vocab)

    @cached_property
    def _genes_first(self) -> bool:
        """Whether all special tokens stand behind the genes: then ids are columns, and no special token is among the columns."""
        return bool(self.vocab.is_gene[: len(self.vocab.genes)].all())

    def _slots(self, vocab: GeneVocab) -> _Slots:
        """Find, once for every vocabulary, where the genes of the store stand among those that `vocab` has."""
        if vocab not in self._tables:
            ids = np.full(len(self.vocab), -1, dtype=np.int64)
            ids[self.vocab.is_gene] = self.match(vocab).ids
            gene_ids, place = np.unique(ids[ids >= 0], return_inverse=True)
            slots = np.full(len(ids), -1, dtype=np.int32)
            slots[ids >= 0] = place
            self._tables[vocab] = _Slots(slots, gene_ids, bool((np.diff(place) > 0).all()))
        return self._tables[vocab]

    def _measured_over(self, vocab: GeneVocab) -> Bool[np.ndarray, "source gene"] | None:
        """Which columns of a batch every source measured; None if all did all, or if that was not written down."""
        if vocab not in self._measured:
            genes = self._read_measured(vocab) if self.manifest.measured else None
            self._measured[vocab] = None if genes is None or genes.all() else genes
        return self._measured[vocab]

    def _read_measured(self, vocab: GeneVocab) -> Bool[np.ndarray, "source gene"]:
        assert self.manifest.measured is not None
        file, n_sources = self.manifest.measured.file, len(self.manifest.sources)
        try:
            tokens = read_measured(self.path / file, n_sources, len(self.vocab))
        except (ValueError, OSError) as error:
            raise _damaged(self.path, f"its file {file} cannot be read ({error})") from error
        if self._is_own(vocab):
            return np.ascontiguousarray(tokens[:, : len(self.vocab.genes)])
        slots, gene_ids, _ = self._slots(vocab)
        genes = np.zeros((n_sources, len(gene_ids)), dtype=bool)
        source, token = np.nonzero(tokens & (slots >= 0))
        genes[source, slots[token]] = True
        return genes


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)


@jit
def _without(indptr: Any, indices: Any, data: Any, slots: Any) -> Any:
    """Rows without the genes that have no slot."""
    begins = np.zeros_like(indptr)
    n_kept = 0
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            n_kept += slots[indices[k]] >= 0
        begins[row + 1] = n_kept
    genes, values = np.empty(n_kept, dtype=np.int32), np.empty(n_kept, dtype=data.dtype)
    n_kept = 0
    for k in range(len(indices)):
        slot = slots[indices[k]]
        if slot >= 0:
            genes[n_kept], values[n_kept] = slot, data[k]
            n_kept += 1
    return begins, genes, values


@jit
def _distinct(offsets: Any, gene_ids: Any, slots: Any, n_slots: int) -> Any:
    """For each cell the number of different slots of its genes."""
    lengths = np.zeros(len(offsets) - 1, dtype=np.int64)
    seen_in = np.full(n_slots, -1)
    for cell in range(len(lengths)):
        for k in range(offsets[cell], offsets[cell + 1]):
            slot = slots[gene_ids[k]]
            if slot >= 0 and seen_in[slot] != cell:
                seen_in[slot] = cell
                lengths[cell] += 1
    return lengths


def _read_manifest(path: Path) -> StoreManifest:
    file = path / MANIFEST
    if not file.is_file():
        partial = Path(f"{path.resolve()}.partial").is_dir()
        found = f"{path} is not a store" + ("; it is still unfinished" if partial else f": it has no {MANIFEST}")
        remedy = "run the same `annformer prepare` with --resume" if partial else "make one with `annformer prepare`"
        raise input_error(found, "a folder made by `annformer prepare`", remedy)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, f"{MANIFEST} is not JSON ({error})") from None
    if isinstance(values, dict) and values.get("format") != FORMAT:
        found = f"the store {path} has format {values.get('format')!r}"
        raise input_error(found, f"format {FORMAT}", "make it again with this version of annformer, or use the version that made it")
    return StoreManifest.read(values, where=str(file))


def _require_sizes(path: Path, files: Sequence[Shard | FileRecord]) -> None:
    for told in files:
        file = path / told.file
        size = file.stat().st_size if file.is_file() else None
        if size != told.n_bytes:
            what = "is missing" if size is None else f"has {size:,} bytes, its manifest says {told.n_bytes:,}"
            raise _damaged(path, f"its file {told.file} {what}")


def _open_shard(path: Path, columns: list[str]) -> list[_Part]:
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
            return [_part(batch, columns) for batch in stream]
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise _damaged(path.parent, f"its shard {path.name} cannot be read ({error})") from error


def _part(batch: pa.RecordBatch, columns: list[str]) -> _Part:
    lists = batch.column("gene_ids")
    codes = {name: batch.column(name).to_numpy(zero_copy_only=True) for name in (*columns, "source", "row")}
    return _Part(
        lists.offsets.to_numpy(zero_copy_only=True),
        lists.values.to_numpy(zero_copy_only=True),
        batch.column("counts").values.to_numpy(zero_copy_only=True),
        codes,
    )


def _damaged(path: Path, what: str) -> InputError:
    return input_error(f"the store {path} is damaged: {what}", "the files as they were written", "copy it again, or make it again")
