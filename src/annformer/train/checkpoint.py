"""Checkpoints of a run: written beside and renamed, the last few kept, the newest readable one found again."""

from __future__ import annotations

import errno
import logging
import os
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from annformer.checkpoints import to_disk
from annformer.errors import InputError, input_error
from annformer.train.ranks import on_first_rank

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{9})\.ckpt")


class CheckpointFiles(TorchCheckpointIO):
    """Writes straight into the file it is given; Lightning's own would make a copy in memory and one among the temporary files first.

    Attributes
    ----------
    refusal
        Why the last file could not be written. Not raised at once, as the other ranks wait for this one.
    """

    refusal: Exception | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ARG002
        """Write, and wait until the file would survive a power cut; only the first rank does."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with Path(path).open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            self.refusal = None
        except (OSError, RuntimeError) as error:  # torch has a RuntimeError of its own for a file that refuses to grow
            below = error.__context__
            self.refusal = below if isinstance(error, RuntimeError) and isinstance(below, OSError) else error


def save(trainer: L.Trainer, folder: Path, *, keep: int) -> None:
    """Write the state after `trainer.global_step` steps; all ranks call it, the first one writes.

    A reader sees the old set of checkpoints or the new one, whatever happens in between.

    Raises
    ------
    InputError
        When the file cannot be written; the checkpoints that stand there are untouched.
    """
    step = trainer.global_step
    path = folder / f"step-{step:09d}.ckpt"
    beside = folder / f".{path.name}.partial"
    trainer.save_checkpoint(beside)
    files = trainer.strategy.checkpoint_io
    assert isinstance(files, CheckpointFiles), "the trainer was made with it"

    def publish() -> None:
        try:
            if files.refusal is not None:
                raise files.refusal
            beside.replace(path)
            to_disk(folder)
            _remove_old(folder, step, keep)
        except OSError as error:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise cannot_write(path, error) from error

    on_first_rank(publish)


def cannot_write(path: Path, error: OSError) -> InputError:
    """Build the message for a file of a run that the system refuses to write."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    found = f"{path} cannot be written: {'the disk is full' if full else error.strerror}"
    remedy = "make room" if full else "see to it that the folder can be written to"
    return input_error(found, "a disk with room for it", f"{remedy}, then run the same command again: it goes on from the last checkpoint")


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Find the checkpoint of the last step that can be read and is what was written; None where there is none.

    Files are read as tensors and plain values only, never unpickled.
    """
    for path in reversed(_paths(folder)):
        try:
            with zipfile.ZipFile(path) as file:  # torch does not compare the checksums
                if (bad := file.testzip()) is not None:
                    msg = f"{bad} in it is damaged"
                    raise ValueError(msg)
            return path, torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # noqa: BLE001  # whatever zipfile and torch make of a damaged file
            log.warning("the checkpoint %s cannot be read (%s): taking the one before it", path, str(error).split("\n")[0])
    return None


def step_of(path: Path) -> int:
    """Steps that had been made when the checkpoint was written."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, f"{path} is not the name of a checkpoint"
    return int(match[1])


def _paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name))


def _remove_old(folder: Path, step: int, keep: int) -> None:
    """Keep the last few; those of later steps could not be read, else the run would have gone on from them."""
    done = [path for path in _paths(folder) if step_of(path) <= step]
    for path in (*(path for path in _paths(folder) if path not in done[-keep:]), *folder.glob(".*.partial")):
        path.unlink(missing_ok=True)
