from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import torch

from annformer.train import checkpoint


def write(folder: Path, *steps: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"step-{step:09d}.ckpt" for step in steps]
    for path, step in zip(paths, steps, strict=True):
        torch.save({"global_step": step, "weights": torch.arange(10_000.0)}, path)
    return paths


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Payload:
    """Unpickled, it writes a file: the sign that foreign code ran."""

    def __reduce__(self):
        return (os.system, ("touch owned",))


def poison(path: Path) -> None:
    torch.save({"global_step": 4, "weights": Payload()}, path)


def test_newest_is_that_of_the_last_step(tmp_path):
    paths = write(tmp_path, 2, 10, 4)
    (tmp_path / ".step-000000012.ckpt.partial").write_bytes(b"half")
    (tmp_path / "step-000000099.ckpt.copy").write_bytes(b"of the user")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[0] == paths[1]
    assert found[1]["global_step"] == 10
    assert checkpoint.step_of(found[0]) == 10


@pytest.mark.parametrize("damage", [truncate, flip, poison, lambda path: path.write_bytes(b"")], ids=["cut", "flipped", "pickle", "empty"])
def test_a_damaged_one_is_named_and_the_one_before_it_taken(tmp_path, caplog, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, bad = write(tmp_path / "checkpoints", 2, 4)
    damage(bad)
    with caplog.at_level(logging.WARNING, logger="annformer"):
        found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    assert found[0] == good
    assert [str(bad) in message for message in caplog.messages] == [True]
    assert not (tmp_path / "owned").exists()


def test_nothing_is_found_where_nothing_is_whole(tmp_path):
    assert checkpoint.newest(tmp_path / "nowhere") is None
    truncate(*write(tmp_path, 2))
    assert checkpoint.newest(tmp_path) is None


def test_the_last_few_are_kept_and_none_of_a_later_step(tmp_path):
    write(tmp_path, 2, 4, 6, 8, 10)
    (tmp_path / ".step-000000008.ckpt.partial").write_bytes(b"half")
    checkpoint._remove_old(tmp_path, step=8, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000006.ckpt", "step-000000008.ckpt"]


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "Read-only")])
def test_what_is_said_of_a_file_that_cannot_be_written(number, words):
    message = str(checkpoint.cannot_write(Path("run/log.csv"), OSError(number, os.strerror(number))))
    assert f"run/log.csv cannot be written: {words}" in message
    assert "run the same command again" in message


@pytest.mark.parametrize(
    ("raised", "kept"),
    [
        (OSError(errno.ENOSPC, "full"), OSError),
        (RuntimeError("a tensor that cannot be written"), RuntimeError),
    ],
)
def test_why_a_file_cannot_be_written_waits_until_all_processes_can_end_together(tmp_path, monkeypatch, raised, kept):
    def refuse(*_: object) -> None:
        raise raised

    files = checkpoint.CheckpointFiles()
    monkeypatch.setattr(torch, "save", refuse)
    files.save_checkpoint({}, tmp_path / "file")
    assert isinstance(files.refusal, kept)
    monkeypatch.undo()
    files.save_checkpoint({}, tmp_path / "file")
    assert files.refusal is None


def test_of_a_file_that_does_not_grow_the_systems_reason_is_kept(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        try:
            raise OSError(errno.EFBIG, "too large")
        except OSError:
            raise RuntimeError("PytorchStreamWriter failed")  # noqa: B904, EM101  # as torch does

    files = checkpoint.CheckpointFiles()
    monkeypatch.setattr(torch, "save", refuse)
    files.save_checkpoint({}, tmp_path / "file")
    assert isinstance(files.refusal, OSError)
    assert files.refusal.errno == errno.EFBIG
