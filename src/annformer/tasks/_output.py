"""An output file that appears whole or not at all, with the unfinished work in a folder beside it."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import annformer
from annformer.data.partial import PartialRows, discard, hold, rows_done
from annformer.errors import InputError, input_error

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAMPLE = 1 << 20


class AnotherWayError(InputError):
    """The user's input cannot be used in this way; with another option it can, and the work done is good for that."""


class Output:
    """The output `path_out` of a long job on `path_in`, and `<path_out>.partial` with what is done of it.

    As a context: entering checks, before any work, that the output may be written. Leaving by an exception leaves nothing at `path_out`;
    the work done stays in the partial folder if it is worth going on with: some is done, and the input was not to blame (or only in the
    way it was asked for).
    """

    def __init__(self, path_in: Path, path_out: Path, *, overwrite: bool) -> None:
        self.path_in, self.path_out, self.overwrite = path_in.expanduser(), path_out.expanduser(), overwrite
        self.partial = self.path_out.with_name(path_out.name + ".partial")
        self.result = self.partial / f"result{path_out.suffix}"
        """Where to write what `publish` moves to `path_out`."""
        self._rows: PartialRows | None = None
        self._found_partial = False

    def __enter__(self) -> Self:
        out = self.path_out
        if out.suffix not in (".h5ad", ".zarr"):
            found = f"the output {out} ends in {out.suffix or 'nothing'!r}"
            raise input_error(found, ".h5ad or .zarr", "name it so")
        if out.exists() and not self.overwrite:
            found = f"{out} exists already"
            raise input_error(found, "a new file", "choose another name, or replace it with overwrite=True (--overwrite)")
        self._require_replaceable()
        self._found_partial = self.partial.is_dir()
        try:
            self.partial.mkdir(exist_ok=True)
            (self.partial / "writable").touch()
            (self.partial / "writable").unlink()
        except OSError as error:
            found = f"nothing can be written to the folder {out.parent} ({error.strerror})"
            raise input_error(found, "an existing folder that you may write to", "make the folder, or choose another output") from error
        self._held = hold(self.partial, self.path_out)
        return self

    def _require_replaceable(self) -> None:
        """Only what a run like this may have written is ever replaced, and never what holds the input."""
        out = self.path_out
        is_store = out.suffix == ".zarr" and any((out / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs"))
        if out.is_dir() and not is_store:
            found = f"{out} is a folder and not a zarr store"
            raise input_error(found, "a file or a zarr store to replace", "choose another name")
        if out.resolve() in self.path_in.resolve().parents:
            found = f"the input {self.path_in} lies inside the output {out}"
            raise input_error(found, "an output beside the input", "choose another output")

    def require_room(self, shape: tuple[int, int], *, copied: bool) -> None:
        """Refuse at once when the disk cannot hold the embedding twice (while it is written) and, if `copied`, the input once more."""
        copied = copied and self.path_in.suffix == self.path_out.suffix
        needed = 2 * 4 * shape[0] * shape[1] + (_size(self.path_in) if copied else 0)
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            found = f"the output needs {needed / 1e9:.2f} GB, but {self.path_out.parent} has {free / 1e9:.2f} GB free"
            raise input_error(found, "room for the output", "free space, choose another disk, or write less with content='embedding'")

    def begin(self, job: Mapping[str, Any], shape: tuple[int, int], *, resume: bool) -> PartialRows:
        """Rows to fill: those of the interrupted run when `resume` is set and there is one, else new ones.

        Work done is not discarded unless `overwrite` is set.
        """
        job = {"version": annformer.__version__, **job, **_identity(self.path_in)}
        self._remove(self.result)
        if self._found_partial and resume and (self.partial / "journal.json").exists():  # killed before its first flush: nothing is safe
            self._rows = PartialRows.resume(self.partial, job, shape)
            logger.info("going on after %s of %s cells", f"{self._rows.done:,}", f"{shape[0]:,}")
            return self._rows
        done = rows_done(self.partial) if self._found_partial else 0
        if done and not self.overwrite:
            found = f"an earlier run did {done:,} of {shape[0]:,} cells and left them in {self.partial}"
            remedy = "go on with them by resume=True (--resume), or discard them by overwrite=True (--overwrite)"
            raise input_error(found, "a word on what should become of them", remedy)
        if self._found_partial:
            logger.warning("discarding the unfinished work in %s (%s cells)", self.partial, f"{done:,}")
            for name in ("rows.npy", "journal.json"):
                self._remove(self.partial / name)
        self._rows = PartialRows(self.partial, job, shape)
        return self._rows

    def publish(self) -> None:
        """Move the result to its place."""
        if self.path_out.is_dir():  # a folder cannot be replaced in one step
            self.path_out.rename(self.partial / "replaced")
        self.result.replace(self.path_out)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        blames_input = isinstance(error, InputError) and not isinstance(error, AnotherWayError)
        worth_keeping = error is not None and not blames_input and self._safe()
        if self._rows is not None:
            self._rows.close()
        os.close(self._held)
        if worth_keeping and self._rows is not None:
            self._remove(self.result)
            done = f"{self._rows.done:,} of {self._rows.shape[0]:,} cells"
            logger.warning("%s are done and kept in %s: resume=True (--resume) goes on from there", done, self.partial)
        elif self._rows is not None or not self._found_partial:
            discard(self.partial)
        if error is not None and _disk_is_full(error):
            found = f"the disk is full or a file may not grow further while writing {self.path_out}"
            raise input_error(
                found, "room for the output", "free space or choose another disk, then go on with resume=True (--resume)"
            ) from error

    def _safe(self) -> bool:
        """Save what can be saved; True when that is anything."""
        if self._rows is None:
            return False
        try:
            self._rows.flush()
        except OSError:  # a full disk: the last journal still holds
            logger.debug("the last rows could not be saved", exc_info=True)
        return self._rows.done > 0

    @staticmethod
    def _remove(path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _disk_is_full(error: BaseException) -> bool:
    """HDF5 tells the system's error number in its text only, and an error may have come up while another was handled."""
    link: BaseException | None = error
    while link is not None:
        inside = re.search(r"errno = (\d+)", str(link))
        if isinstance(link, OSError | RuntimeError) and (getattr(link, "errno", None) in _FULL or (inside and int(inside[1]) in _FULL)):
            return True
        link = link.__cause__ or link.__context__
    return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _identity(path: Path) -> dict[str, Any]:
    """What tells this input from another, or from itself after a change: size, time, and a hash of a sample of its content."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    with files[0].open("rb") as content:
        for place in (0, files[0].stat().st_size // 2, max(0, files[0].stat().st_size - _SAMPLE)):
            content.seek(place)
            digest.update(content.read(_SAMPLE))
    newest = max(file.stat().st_mtime_ns for file in files)
    return {"input size": _size(path), "input changed at": newest, "input content": digest.hexdigest()[:16]}
