"""fit(): a planned run, from its first step or from its last checkpoint, to its end."""

from __future__ import annotations

import logging
import re
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import pandas as pd
import torch

from annformer.errors import input_error
from annformer.model.encoder import Layer
from annformer.scgpt import ScGPT
from annformer.tokens import TokenBatch
from annformer.train import checkpoint
from annformer.train.config import Machine
from annformer.train.datamodule import CellDataModule
from annformer.train.log import log_row, loggers, read_log
from annformer.train.plan import TrainingPlan
from annformer.train.progress import ProgressReport
from annformer.train.ranks import SaidElsewhere, of_all_ranks, on_first_rank, stop_all
from annformer.train.strategy import placement

log = logging.getLogger(__name__)

_NOISE = (
    "does not have many workers",
    "can be set to",
    "`isinstance(treespec, LeafSpec)`",
    "srun",
    "Experiment logs directory",
    "You're resuming from a checkpoint that ended before the epoch ended",
    "`lightning.pytorch.callbacks.ModelCheckpoint`",
)
"""Lightning's remarks that do not concern a run planned by us."""


class RunStopped(KeyboardInterrupt):
    """The run was stopped from outside; its message says what was saved."""


def fit(plan: TrainingPlan, data: CellDataModule, folder: Path, machine: Machine | None = None, *, resume: bool = True) -> pd.DataFrame:
    """Make the steps of `data.plan` that are not yet made, with a validation before the first and then evenly.

    Parameters
    ----------
    folder
        Gets `log.csv` and `checkpoints`; where it holds checkpoints, the run goes on from the last one, and ends with the same weights
        as if it had never stopped. Every rank reads the checkpoint, so that it has to stand on a disk that all nodes share.
    resume
        False: the folder holds no checkpoint, or will not when the first rank has cleared it.

    Returns
    -------
    The log: a row per step that logged something, columns `step`, `train/...`, `validation/...`.

    Raises
    ------
    RunStopped
        After a signal (Ctrl-C, SIGTERM), when the checkpoint is written; after a second one, at once.
    """
    machine = machine or Machine()
    require_machine(machine)
    found = checkpoint.newest(folder / checkpoint.FOLDER) if resume else None
    path, start = (None, 0) if found is None else (found[0], checkpoint.step_of(found[0]))
    if path is not None:
        log.info("going on after step %d of %d", start, data.n_steps)
    report, signals = ProgressReport(data, start), _Signals(plan)
    keeper = _Keeper(data, folder, start, report, signals)
    with _quiet():
        trainer = L.Trainer(
            max_steps=data.n_steps,
            max_epochs=-1,
            logger=loggers(machine.loggers, folder, start),
            callbacks=[report, keeper],
            limit_val_batches=0,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **placement(machine, plan.config.precision, plan.model),
        )
        if found is not None:
            plan.on_load_checkpoint(found[1])
        if start < data.n_steps and not plan.lost_patience:
            try:
                with signals, compiled(plan.model, wanted=plan.config.compile):
                    trainer.fit(plan, datamodule=data, ckpt_path=path, weights_only=True)
            except SaidElsewhere:
                raise
            except SystemExit:  # what Lightning makes of a KeyboardInterrupt
                raise keeper.stopped() from None
    if keeper.stopped_at is not None:
        raise stop_all(keeper.stopped())
    if plan.config.patience is not None:
        _take_best(plan, found)
    return on_first_rank(lambda: read_log(folder))


@contextmanager
def compiled(model: ScGPT, *, wanted: bool) -> Iterator[None]:
    """With the part of every layer that looks at one token at a time compiled; the model is afterwards what it was."""
    layers = [layer for layer in model.encoder.layers if isinstance(layer, Layer)] if wanted else []
    for layer in layers:
        vars(layer)["by_token"] = torch.compile(layer.by_token, dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["by_token"]


def _take_best(plan: TrainingPlan, found: tuple[Path, dict[str, Any]] | None) -> None:
    """Give the model the weights of the best validation; without one, of a run that was finished before, those of its end."""
    if plan.best is not None:
        plan.model.load_state_dict(plan.best["weights"])
    elif found is not None:
        plan.load_state_dict(found[1]["state_dict"])


def require_machine(machine: Machine) -> None:
    """Refuse devices that are not there."""
    n_gpus = torch.cuda.device_count()
    if machine.accelerator == "cuda" and not n_gpus:
        found = "a GPU is asked for, and torch sees none"
        raise input_error(found, "an NVIDIA GPU and a build of torch for it", "compute on the CPU, or install torch for CUDA")
    if machine.accelerator != "cpu" and n_gpus and isinstance(machine.devices, int) and machine.devices > n_gpus:
        found = f"{machine.devices} devices are asked for, and torch sees {n_gpus}"
        raise input_error(found, f"at most {n_gpus}", "lower --devices")


class _Keeper(L.Callback):
    """What happens between steps: log, validation, checkpoint, stop."""

    def __init__(self, data: CellDataModule, folder: Path, start: int, report: ProgressReport, signals: _Signals) -> None:
        self.data, self.folder, self.start, self.report, self.signals = data, folder, start, report, signals
        n = data.config.validations
        self.validate_after = {round(i * data.n_steps / n) for i in range(1, n + 1)} if n else set()
        self.saved = time.monotonic()
        self.stopped_at: int | None = None
        self.batches: Sequence[TokenBatch] = ()

    def setup(self, trainer: L.Trainer, plan: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        starts = of_all_ranks(self.start)
        if len(set(starts)) > 1:
            found = f"the processes find checkpoints of different steps: {', '.join(map(str, starts))}"
            raise stop_all(input_error(found, "the same files on every node", "put the folder of the run on a disk that all nodes share"))

    def on_train_start(self, trainer: L.Trainer, plan: L.LightningModule) -> None:
        assert isinstance(plan, TrainingPlan), "fit() trains a TrainingPlan"
        self.signals.arm()  # Lightning has put its own handlers in their place
        self.batches = self.data.validation_batches(trainer.global_rank, trainer.world_size)
        if self.start == 0 and self.data.config.validations:
            self._validate(trainer, plan)

    def on_train_batch_start(self, trainer: L.Trainer, plan: L.LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        assert isinstance(plan, TrainingPlan), "fit() trains a TrainingPlan"
        plan.wants_checkpoint = time.monotonic() - self.saved > 60 * self.data.config.checkpoint_minutes

    def on_train_batch_end(self, trainer: L.Trainer, plan: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        assert isinstance(plan, TrainingPlan) and plan.result is not None, "a step has a result"
        config, step, last = plan.config, trainer.global_step, trainer.global_step == self.data.n_steps
        if step in self.validate_after:
            self._validate(trainer, plan)
        every = config.checkpoint_steps
        if plan.lost_patience and not last:
            said = "step %d of %d: no better validation since step %d, so the run ends"
            log.info(said, step, self.data.n_steps, plan.best["step"] if plan.best else 0)
            trainer.should_stop = last = True
        if last or plan.result.stop or plan.result.checkpoint or (every and step % every == 0):
            with self.report.paused():
                checkpoint.save(trainer, self.folder / checkpoint.FOLDER, keep=config.keep_checkpoints)
            self.saved = time.monotonic()
        if plan.result.stop and not last:
            self.stopped_at = step
            trainer.should_stop = True

    def stopped(self) -> RunStopped:
        """What to say of a run that was stopped."""
        found = "stopped at once; what came after the last checkpoint is lost"
        if self.stopped_at is not None:
            found = f"stopped after step {self.stopped_at} of {self.data.n_steps}, which is saved"
        return RunStopped(str(input_error(found, "to run to the end", "run the same command again: it goes on from the last checkpoint")))

    def _validate(self, trainer: L.Trainer, plan: TrainingPlan) -> None:
        with self.report.paused():
            losses = plan.mean_losses(self.batches)
        log_row(trainer.loggers, {f"validation/{name}": value for name, value in losses.items()}, trainer.global_step)
        if trainer.is_global_zero:
            said = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            log.info("step %d of %d: on held-out cells %s", trainer.global_step, self.data.n_steps, said)
        if plan.config.patience is not None:
            plan.judge(losses, trainer.global_step)


class _Signals:
    """Ctrl-C, SIGTERM and SIGUSR1 (what clusters send before the time is up) end the run at the end of a step; a second one at once."""

    def __init__(self, plan: TrainingPlan) -> None:
        self.plan = plan
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1] if threading.current_thread() is threading.main_thread() else []
        self.before = {number: signal.getsignal(number) for number in numbers}

    def __enter__(self) -> None:
        self.arm()

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def arm(self) -> None:
        """Take over the signals."""
        for number in self.before:
            signal.signal(number, self._stop)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if self.plan.wants_to_stop:
            raise KeyboardInterrupt
        log.warning("signal %s: writing a checkpoint after this step, then stopping", signal.Signals(number).name)
        self.plan.wants_to_stop = True


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's banner, tips and the warnings of `_NOISE`, for as long as the run lasts."""
    names = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in names]
    for logger in names:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for text in _NOISE:
                warnings.filterwarnings("ignore", message=f".*{re.escape(text)}")
            yield
    finally:
        for logger, level in zip(names, levels, strict=True):
            logger.setLevel(level)
