"""A store that is being made: the folder beside it, its journal, and the move to its place when all is done."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from annformer.data.partial import hold
from annformer.data.store import MANIFEST, VOCAB
from annformer.data.store_manifest import StoreManifest
from annformer.data.studies import file_record
from annformer.errors import InputError, input_error
from annformer.vocab import GeneVocab

logger = logging.getLogger(__name__)


@dataclass
class State:
    """How far the work is; everything before it is safe on the disk."""

    source: int = 0
    """Study that is read."""
    row: int = 0
    """Rows of it that are done."""
    sizes: list[int] = field(default_factory=list)
    """Of the bucket files."""
    scattered: bool = False
    """All studies are read."""
    categories: dict[str, list[str]] = field(default_factory=dict)
    studies: list[dict[str, Any]] = field(default_factory=list)
    """For every study that was opened, how it was read."""
    left_out: list[dict[str, int]] = field(default_factory=list)
    """For every study, how many cells were left out for which reason."""
    shards: list[dict[str, Any]] = field(default_factory=list)
    """Those that are finished."""

    def counters(self, source: int) -> dict[str, int]:
        """Cells of a study that were left out, by reason; to be changed in place."""
        while len(self.left_out) <= source:
            self.left_out.append({})
        return self.left_out[source]


class PartialStore:
    """The store `out` in the making, in `<out>.partial`.

    As a context: entering checks that it may be written. Leaving by an exception leaves nothing at `out`; the work stays beside it for
    `resume`, unless the input was to blame.
    """

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.out, self.overwrite = out.expanduser(), overwrite
        self.folder = self.out.with_name(self.out.name + ".partial")
        self.buckets, self.store = self.folder / "buckets", self.folder / "store"
        self.state = State()
        self._job: dict[str, Any] = {}
        self._found = False

    def __enter__(self) -> Self:
        if self.out.exists() and not self.overwrite:
            found = f"{self.out} exists already"
            raise input_error(found, "a new folder", "choose another name, or replace it with overwrite=True (--overwrite)")
        if self.out.exists() and not (self.out / MANIFEST).is_file() and not (self.out.is_dir() and not any(self.out.iterdir())):
            found = f"{self.out} exists and is not a store"
            raise input_error(found, "a store to replace", "choose another name")
        self._found = self.folder.is_dir()
        try:
            for folder in (self.folder, self.buckets, self.store):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            found = f"nothing can be written to the folder {self.out.parent} ({error.strerror})"
            raise input_error(found, "an existing folder that you may write to", "make the folder, or choose another output") from error
        self._held = hold(self.folder, self.out)
        return self

    def require_room(self, n_bytes: int) -> None:
        """Refuse at once when the disk cannot hold the store; buckets go as shards come."""
        free = shutil.disk_usage(self.folder).free + sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        if 1.1 * n_bytes > free:
            found = f"the store may need {1.1 * n_bytes / 1e9:.3g} GB, but {self.out.parent} has {free / 1e9:.3g} GB free"
            raise input_error(found, "room for the store", "free space or choose another disk")

    def begin(self, job: dict[str, Any], *, resume: bool) -> None:
        """Go on with the work of a stopped run when `resume` is set and there is some, else begin anew."""
        self._job = job
        journal = self.folder / "journal.json"
        if self._found and resume and journal.exists():
            begun = json.loads(journal.read_text(encoding="utf-8"))
            differences = [name for name in job if begun["job"].get(name) != job[name]]
            if differences:
                found = f"the work kept in {self.folder} cannot be continued: other {', '.join(differences)}"
                raise input_error(found, "the same sources and options as when it was begun", "run again without --resume to begin anew")
            self.state = State(**begun["state"])
            self._require_shards()
            logger.info(
                "going on with the work in %s: %d studies and %d shards are done", self.folder, self.state.source, len(self.state.shards)
            )
            return
        if journal.exists():
            logger.warning("discarding the unfinished work in %s; resume=True (--resume) would have gone on with it", self.folder)
            journal.unlink()
        for folder in (self.buckets, self.store):
            shutil.rmtree(folder)
            folder.mkdir()

    def _require_shards(self) -> None:
        for shard in self.state.shards:
            file = self.store / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["n_bytes"]:
                found = f"{file}, which the journal says is finished, is missing or has another size"
                raise input_error(found, "the work as it was left", "run again without --resume to begin anew")

    def save(self) -> None:
        """Write the journal."""
        write_safely(self.folder / "journal.json", json.dumps({"job": self._job, "state": asdict(self.state)}))

    def publish(self, manifest: StoreManifest, vocab: GeneVocab) -> None:
        """Complete the store and move it to its place."""
        vocab.to_json(self.store / VOCAB)
        manifest = manifest.with_(vocab=file_record(self.store / VOCAB).model_dump())
        write_safely(self.store / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        if self.out.exists():  # a folder cannot be replaced in one step
            self.out.rename(self.folder / "replaced")
        self.store.rename(self.out)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._held)
        begun = (self.folder / "journal.json").exists()
        if error is None or (isinstance(error, InputError) and not self._found) or not begun:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            logger.warning("the work done is kept in %s: resume=True (--resume) goes on from there", self.folder)


def write_safely(path: Path, text: str) -> None:
    """Write a file that is whole whenever it is there."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
