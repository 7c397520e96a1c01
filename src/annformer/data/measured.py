"""Which genes each source of a store measured, expressed in a cell or not: what tells a zero from a gap.

While a store is made, a note of every source waits in a folder of its own; in the end they stand in one file, a row of bits for each source
and a bit for each token of the vocabulary.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Bool, Int

from annformer.data.store_manifest import FileRecord
from annformer.data.studies import file_record

FILE: Final = "measured.npy"
"""Not an .arrow file: those of a store are its cells."""


def note_measured(notes: Path, number: int, gene_ids: Int[np.ndarray, "column"], n_tokens: int) -> None:
    """Write down the genes of one source; -1 stands for no gene."""
    which = np.zeros(n_tokens, dtype=bool)
    which[gene_ids[gene_ids >= 0]] = True
    _save(_note(notes, number), np.packbits(which))


def write_measured(folder: Path, notes: Path, n_sources: int) -> FileRecord:
    """Bring the notes of all sources together."""
    path = folder / FILE
    _save(path, np.stack([np.load(_note(notes, number)) for number in range(n_sources)]))
    return file_record(path)


def read_measured(path: Path, n_sources: int, n_tokens: int) -> Bool[np.ndarray, "source token"]:
    """Read what `write_measured` wrote.

    Raises
    ------
    ValueError
        When it is something else.
    """
    bits = np.load(path)
    if bits.shape != (n_sources, -(-n_tokens // 8)) or bits.dtype != np.uint8:
        msg = f"{path.name} holds {bits.shape} of {bits.dtype}, not bits of {n_tokens} tokens for {n_sources} sources"
        raise ValueError(msg)
    return np.unpackbits(bits, axis=1, count=n_tokens).view(bool)


def _note(notes: Path, number: int) -> Path:
    return notes / f"measured-{number:05d}.npy"


def _save(path: Path, bits: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, bits)
        file.flush()
        os.fsync(file.fileno())  # the journal, which says that a source is read, must not outlive its note
