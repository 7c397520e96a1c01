"""An embedded reference: vectors with names and labels in a folder, memory-mapped, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32, Int, UInt64
from numpy import ndarray
from pydantic import Field

from annformer.checkpoints import read_json, write_folder
from annformer.config import Config
from annformer.errors import InputError, input_error
from annformer.scgpt import ScGPT
from annformer.tasks._search import Nearest, Parts, blocks, build_lists, nearest, nearest_by_lists, take
from annformer.tokenizer import TokenizerSettings

FORMAT: Final = 2
"""2: with a key of every cell, so that none is added twice."""
SETTINGS: Final = "index.json"
MODEL: Final = "model"
MAPPED: Final = ("vectors.npy", "lists.faiss")
"""Files that are read where they are needed: their size is checked, not their content."""
FILES: Final = (SETTINGS, "vectors.npy", "cells.arrow", "genes.arrow", "spacing.npy", "lists.faiss", MODEL)
SPACED: Final = 2_000
"""Cells of the reference whose distances to the others say what is usual there."""


class Study(Config):
    """Cells that came together."""

    name: str
    n_cells: int
    n_left_out: int
    """Without a label, without an expressed gene that the model knows, or in the index already."""


class IndexSettings(Config):
    """What `index.json` says beside the files."""

    model: str
    fingerprint: str
    tokenizer: TokenizerSettings
    label_key: str
    n_neighbours: int = Field(ge=1)
    search: Literal["exact", "faiss"]
    version: str
    """Of annformer, that wrote it."""
    studies: tuple[Study, ...]


@dataclass(frozen=True, eq=False)
class ReferenceIndex:
    """Vectors of length 1 of the cells of a reference."""

    settings: IndexSettings
    parts: Parts
    names: pa.ChunkedArray
    codes: Int[ndarray, "cell"]
    """Of the label of every cell, in `classes`."""
    classes: tuple[str, ...]
    keys: UInt64[ndarray, "cell"]
    """Of the counts of every cell: by them a cell that comes again is known."""
    genes: Mapping[str, int]
    """Genes that were read, with the number of cells that express them."""
    spacing: Float32[ndarray, "sampled"]
    """Mean distances of cells of the reference to their nearest others, ascending."""
    lists: Any = None
    """The faiss index, where there is one."""

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.codes)

    def nearest(self, queries: Float32[ndarray, "query width"], n: int, **options: Any) -> Nearest:
        """Find the `n` nearest cells of each query."""
        if self.lists is None:
            return nearest(queries, self.parts, n, **options)
        return nearest_by_lists(queries, self.parts, n, self.lists)

    def percentile(self, distances: Float[ndarray, "query"]) -> Float32[ndarray, "query"]:
        """Share of the reference whose cells lie nearer to their neighbours than this."""
        return (np.searchsorted(self.spacing, distances) / len(self.spacing)).astype(np.float32)

    def save(self, folder: Path, model: ScGPT) -> None:
        """Write the index with its model; an index that stands there is replaced."""

        def fill(fresh: Path) -> None:
            _write_vectors(self.parts, fresh / "vectors.npy")
            labels = pa.DictionaryArray.from_arrays(pa.array(self.codes, pa.int32()), pa.array(self.classes, pa.large_string()))
            _write_table(fresh / "cells.arrow", {"cell": self.names.combine_chunks(), "label": labels, "key": pa.array(self.keys)})
            genes = pa.array(list(self.genes), pa.large_string())
            _write_table(fresh / "genes.arrow", {"gene": genes, "n_cells": pa.array(list(self.genes.values()), pa.int64())})
            np.save(fresh / "spacing.npy", self.spacing, allow_pickle=False)
            if self.lists is not None:
                import faiss

                faiss.write_index(self.lists, str(fresh / "lists.faiss"))
            files = {path.name: _stamp(path) for path in sorted(fresh.iterdir())}
            content = {"format": FORMAT, **self.settings.model_dump(mode="json"), "files": files}
            (fresh / SETTINGS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            model.save_pretrained(fresh / MODEL)

        write_folder(folder, FILES, fill)

    @classmethod
    def open(cls, folder: Path) -> ReferenceIndex:
        """Open the index in `folder`; the vectors stay on the disk.

        Raises
        ------
        InputError
            When there is no index there, or it is damaged.
        """
        settings = _read_settings(folder)
        try:
            vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
            cells, genes = _read_table(folder / "cells.arrow"), _read_table(folder / "genes.arrow")
            spacing = np.load(folder / "spacing.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError, pa.ArrowException) as error:
            raise _damaged(folder, f"cannot be read: {str(error).splitlines()[0]}") from None
        label = cells["label"].combine_chunks()
        return cls(
            settings=settings,
            parts=(vectors,),
            names=cells["cell"],
            codes=label.indices.to_numpy(),
            classes=tuple(label.dictionary.to_pylist()),
            keys=cells["key"].to_numpy(),
            genes=dict(zip(genes["gene"].to_pylist(), genes["n_cells"].to_pylist(), strict=True)),
            spacing=spacing,
            lists=_read_lists(folder) if settings.search == "faiss" else None,
        )

    def with_cells(
        self,
        vectors: Float32[ndarray, "new width"],
        names: Sequence[str] | ndarray,
        labels: Sequence[str] | ndarray,
        keys: UInt64[ndarray, "new"],
        genes: Mapping[str, int],
        study: Study,
    ) -> ReferenceIndex:
        """Return an index that holds more cells."""
        classes = tuple(dict.fromkeys((*self.classes, *sorted(set(labels)))))
        place = {name: code for code, name in enumerate(classes)}
        codes = np.array([place[label] for label in labels], np.int32)
        fresh = pa.array(np.asarray(names, object), pa.large_string())
        grown = replace(
            self,
            settings=self.settings.with_(studies=[*self.settings.model_dump()["studies"], study.model_dump()]),
            parts=(*self.parts, vectors),
            names=pa.chunked_array([*self.names.chunks, fresh], pa.large_string()),
            codes=np.concatenate([self.codes, codes]),
            classes=classes,
            keys=np.concatenate([self.keys, keys]),
            genes=dict(Counter(self.genes) + Counter(genes)),
        )
        grown = replace(grown, lists=build_lists(grown.parts) if self.settings.search == "faiss" else None)
        return replace(grown, spacing=_spacing(grown))


def new_index(settings: IndexSettings, width: int) -> ReferenceIndex:
    """Return an index without cells."""
    return ReferenceIndex(
        settings=settings,
        parts=(np.empty((0, width), np.float32),),
        names=pa.chunked_array([], pa.large_string()),
        codes=np.empty(0, np.int32),
        classes=(),
        keys=np.empty(0, np.uint64),
        genes={},
        spacing=np.empty(0, np.float32),
    )


def distances(similarities: Float32[ndarray, "..."]) -> Float32[ndarray, "..."]:
    """Cosine distances: 0 for the same direction, 1 for none in common."""
    return np.maximum(0, 1 - similarities)


def _spacing(index: ReferenceIndex) -> Float32[ndarray, "sampled"]:
    """Mean distances of a sample of the cells to their nearest others."""
    n, k = index.n_cells, index.settings.n_neighbours
    sample = np.sort(np.random.default_rng(0).choice(n, min(n, SPACED), replace=False))
    found = index.nearest(take(index.parts, sample), k + 1)
    others = found.rows != sample[:, None]
    others[others.all(axis=1), -1] = False  # so many are the same that the cell itself is not among them
    return np.sort(distances(found.similarities[others].reshape(-1, k)).mean(axis=1))


def _write_vectors(parts: Parts, path: Path) -> None:
    """As numpy writes arrays, block by block: a full disk is an error here, in a memory map it would end the process."""
    with path.open("wb") as file:
        shape = (sum(map(len, parts)), parts[0].shape[1])
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for _, block in blocks(parts):
            file.write(block.data)


def _write_table(path: Path, columns: Mapping[str, pa.Array]) -> None:
    table = pa.table(dict(columns))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _read_table(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _stamp(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if path.name in MAPPED:
        return {"bytes": size}
    with path.open("rb") as content:
        return {"bytes": size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _read_settings(folder: Path) -> IndexSettings:
    """Settings of the index, once its files are those that were written."""
    if not (folder / SETTINGS).is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing" if folder.is_dir() else None
        found = f"{folder} is no index: " + ("there is no such folder" if there is None else f"it holds {there}")
        raise input_error(found, "a folder that `annformer map fit` or ReferenceMapper.save wrote", "give its path")
    content = read_json(folder / SETTINGS)
    number, files = content.pop("format", None), content.pop("files", None)
    if number != FORMAT or not isinstance(files, dict):
        found = f"{folder / SETTINGS} has format {number!r}"
        raise input_error(
            found,
            f"the index of a reference, format {FORMAT}",
            "fit the reference again, or give the folder of an index",
        )
    settings = IndexSettings.read(content, where=str(folder / SETTINGS))
    for name, stamp in files.items():
        if not (folder / name).is_file():
            raise _damaged(folder, f"lacks {name}")
        if _stamp(folder / name) != stamp:
            raise _damaged(folder, f"has another {name} than was written")
    return settings


def _read_lists(folder: Path) -> Any:
    import faiss

    try:
        return faiss.read_index(str(folder / "lists.faiss"), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise _damaged(folder, f"has a lists.faiss that cannot be read: {str(error).splitlines()[-1][:200]}") from None


def _damaged(folder: Path, what: str) -> InputError:
    remedy = "copy the folder again from where it was written, or fit the reference again"
    return input_error(f"the index {folder} is damaged: it {what}", "the files as `annformer map fit` wrote them", remedy)
