"""Runs of `annformer pretrain` in processes of their own, that tests kill, fill the disk of, or stop.

The processes are copies of one that has imported everything, so that a test pays for the run alone; SIGKILL ends them like any other.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["annformer.cli.pretrain", "annformer.train.pretrain", "annformer.data.store"])

Fault = tuple[str, int]
"""What goes wrong, and at the how manieth time."""


@dataclass
class Run:
    """`annformer pretrain` in a process of its own."""

    words: tuple[str, ...]
    out: Path
    fault: Fault | None = None
    process: BaseProcess = field(init=False)

    def __post_init__(self) -> None:
        self.errors = self.out.with_name(self.out.name + ".err")
        words = ("pretrain", *self.words, "--out", str(self.out))
        self.process = _SERVER.Process(target=_pretrain, args=(words, self.errors, self.fault))
        self.process.start()

    def end(self, *, timeout: float = 120) -> int:
        """Wait for the end; minus the number of the signal where one killed it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "the run does not end"
        return self.process.exitcode

    def said(self) -> str:
        """All of stderr."""
        return self.errors.read_text()

    def wait_for_step(self, step: int) -> None:
        """Until the log has a row of that step."""
        began = time.monotonic()
        while steps_logged(self.out) < step:
            assert self.process.is_alive(), self.said()
            assert time.monotonic() < began + 120, "the run does not begin"
            time.sleep(0.002)

    def kill(self, number: int) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def steps_logged(out: Path) -> int:
    """Last step in the log of a run; -1 where there is none."""
    try:
        with (out / "log.csv").open(newline="") as file:
            return max((int(row["step"]) for row in csv.DictReader(file) if row["step"].isdigit()), default=-1)
    except FileNotFoundError:
        return -1


def _pretrain(words: tuple[str, ...], errors: Path, fault: Fault | None) -> None:
    import torch

    from annformer.cli import main
    from annformer.train import folder, progress

    # a second of every run each, and not what these tests are about
    folder.draw_curves = lambda *_: None
    progress.peak_flops = lambda *_: 1e9
    multiprocessing.set_start_method("fork", force=True)  # as in a command of its own: a server between the two would die of signals
    os.setpgid(0, 0)  # a group of its own, with its loading processes
    with errors.open("a") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    torch.set_num_threads(1)
    if fault is not None:
        FAULTS[fault[0]](fault[1])
    sys.exit(main(list(words)))


def _at(nth: int, owner: Any, name: str, then: Callable[..., None], *, which: Callable[..., bool] = lambda *_: True) -> None:
    """Call `then` in place of the nth call of a function."""
    real, seen = getattr(owner, name), 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal seen
        if which(*args):
            seen += 1
            if seen == nth:
                return then(real, *args, **options)
        return real(*args, **options)

    setattr(owner, name, call)


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _while_writing(nth: int) -> None:
    import torch

    def half(real: Callable, state: Any, file: Any) -> None:
        real(state, file)
        file.flush()
        os.ftruncate(file.fileno(), file.tell() // 2)
        _die()

    _at(nth, torch, "save", half)


def _before_rename(nth: int) -> None:
    _at(nth, Path, "replace", _die, which=lambda path, *_: path.name.endswith(".ckpt.partial"))


def _disk_full(nth: int, bytes_left: Callable[[Path], int]) -> None:
    from annformer.train import checkpoint

    def save(real: Callable, trainer: Any, folder: Path, *, keep: int) -> None:
        real(trainer, folder, keep=keep)
        limit = bytes_left(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    _at(nth, checkpoint, "save", save)


def _slow_step(nth: int) -> None:
    from annformer.train.plan import TrainingPlan

    def step(_real: Callable, *_: Any) -> None:
        time.sleep(60)

    _at(nth, TrainingPlan, "_result", step)


FAULTS: dict[str, Callable[[int], None]] = {
    "killed while writing a checkpoint": _while_writing,
    "killed before a checkpoint is flushed": lambda nth: _at(2 * nth - 1, os, "fsync", _die),
    "killed before a checkpoint gets its name": _before_rename,
    "killed before old checkpoints are removed": lambda nth: _at(2 * nth, os, "fsync", _die),
    "slow step": _slow_step,
    "no room for a checkpoint": lambda nth: _disk_full(nth, lambda _folder: 50_000),
    "no room for the log": lambda nth: _disk_full(nth, lambda folder: (folder.parent / "log.csv").stat().st_size + 30),
}
"""What can go wrong in the process itself."""
