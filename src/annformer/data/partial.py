"""Rows of a long computation, kept on disk as they come, so that a killed run can go on."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from annformer.errors import InputError, input_error

logger = logging.getLogger(__name__)

FORMAT = 1
_BLOCK_BYTES = 1 << 24


class PartialRows:
    """A float32 matrix that is filled from the top: the rows in `rows.npy`, what was asked and how far it got in `journal.json`.

    Rows count as done when `flush` has put them on the disk: whatever a killed process wrote after that is written again.

    Parameters
    ----------
    folder
        Must exist.
    job
        Plain JSON values that say everything the rows depend on; a run goes on only with the same.
    shape
        Of the whole matrix.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], shape: tuple[int, int]) -> None:
        self.folder, self.job, self.shape = folder, dict(job), shape
        self.done = 0
        """Rows that are safe."""
        self.unsafe = 0
        """Rows that came after them."""
        self._row_bytes = 4 * shape[1]
        self._file = (folder / "rows.npy").open("r+b" if (folder / "rows.npy").exists() else "w+b")
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._header_bytes = self._file.tell()

    @classmethod
    def resume(cls, folder: Path, job: Mapping[str, Any], shape: tuple[int, int]) -> PartialRows:
        """Go on where the journal in `folder` says.

        Raises
        ------
        InputError
            When the journal cannot be read or belongs to another job; it names every difference.
        """
        begun = _read_journal(folder)
        differences = [
            f"{name} was {begun['job'].get(name)!r}, is {job.get(name)!r}"
            for name in {**begun["job"], **job}
            if begun["job"].get(name) != job.get(name)
        ]
        if differences:
            found = f"the work kept in {folder} cannot be continued: " + "; ".join(differences)
            raise input_error(
                found,
                "the same model, settings and input as when it was begun",
                "run again with overwrite=True (--overwrite) instead of resume (--resume) to begin anew",
            )
        rows = cls(folder, job, shape)
        rows.done = begun["done"]
        rows._file.seek(rows._header_bytes + rows.done * rows._row_bytes)
        return rows

    def append(self, rows: Float[np.ndarray, "cell width"]) -> None:
        """Write the next rows; they are safe after the next `flush`."""
        self._file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
        self.unsafe += len(rows)

    def flush(self) -> None:
        """Put everything on the disk, then the journal that says so."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done, self.unsafe = self.done + self.unsafe, 0
        text = json.dumps({"format": FORMAT, "job": self.job, "done": self.done}, indent=1)
        beside = self.folder / "journal.json.new"
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.folder / "journal.json")

    def blocks(self) -> Iterator[Float[np.ndarray, "cell width"]]:
        """All rows from the top, some MB at a time; needs all of them to be done."""
        assert self.done == self.shape[0], f"{self.done} of {self.shape[0]} rows are done"
        size = max(1, _BLOCK_BYTES // self._row_bytes)
        self._file.seek(self._header_bytes)
        for first in range(0, self.shape[0], size):
            n_rows = min(size, self.shape[0] - first)
            yield np.frombuffer(self._file.read(n_rows * self._row_bytes), dtype="<f4").reshape(n_rows, self.shape[1])

    def close(self) -> None:
        """Close the file; what was flushed stays."""
        with suppress(OSError):  # a full disk has been reported by then
            self._file.close()


def rows_done(folder: Path) -> int:
    """Rows that the journal in `folder` calls safe; 0 when it cannot be read."""
    try:
        return int(_read_journal(folder)["done"])
    except InputError:
        return 0


def discard(folder: Path) -> None:
    """Remove the folder and all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)


def _read_journal(folder: Path) -> dict[str, Any]:
    path = folder / "journal.json"
    try:
        journal: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = journal["format"] == FORMAT and isinstance(journal["done"], int) and isinstance(journal["job"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        found = f"{path} is missing or is not a journal of this version of annformer"
        raise input_error(found, "the journal of an interrupted run", "run again without resume (--resume) to begin anew")
    return journal


def hold(folder: Path, out: Path) -> int:
    """Keep a second run away from the unfinished work in `folder`, which will become `out`.

    Returns
    -------
    An open descriptor: closing it lets go, and so does the system when this process ends, however it ends.
    """
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        found = f"another run is writing {out} just now"
        raise input_error(found, "one run for one output", "wait for it, or choose another output") from None
    except OSError as error:  # some network file systems have no locks
        logger.debug("no lock on %s: %s", folder, error)
    return held
