"""What a run says about itself while it runs: a bar or lines, and a row of numbers every few steps."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from annformer.durations import in_words
from annformer.train.datamodule import CellDataModule
from annformer.train.flops import batch_flops, peak_flops
from annformer.train.log import log_row
from annformer.train.plan import Step, StepResult, TrainingPlan

log = logging.getLogger(__name__)

_LINES = 50
"""Lines of a whole run, where there is no terminal for a bar."""


class ProgressReport(L.Callback):
    """Log losses, learning rate, gradient and speed; delivered cells and tokens are counted, not planned ones.

    Parameters
    ----------
    start
        Steps that had been made before this process.
    """

    def __init__(self, data: CellDataModule, start: int) -> None:
        self.data, self.start = data, start
        self.began = self.logged = 0.0
        self.cells = self.tokens = self.steps = self.flops = 0
        self.bar: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, plan: L.LightningModule) -> None:
        """Start the clock and, on a terminal, the bar."""
        assert isinstance(plan, TrainingPlan), "fit() trains a TrainingPlan"
        peak_flops(plan.device, plan.config.precision)  # measured once, and not on the clock
        self.began = self.logged = time.perf_counter()
        if trainer.is_global_zero and sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
            columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.add_task("training", total=self.data.n_steps, completed=self.start, said="")
            self.bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, plan: L.LightningModule, outputs: Any, batch: Step, batch_idx: int) -> None:  # noqa: ARG002
        """Count what was delivered; every few steps log and say it."""
        assert isinstance(plan, TrainingPlan) and plan.result is not None, "a step has a result"
        step, result = trainer.global_step, plan.result
        self.flops += sum(batch_flops(plan.model, tokens) for tokens in batch[1])
        self.cells, self.tokens, self.steps = self.cells + result.n_cells, self.tokens + result.n_tokens, self.steps + 1
        if step % plan.config.log_steps and step != self.data.n_steps:
            return
        now = time.perf_counter()
        speeds = self._speeds(plan, now - self.logged)
        row = {f"train/{name}": value for name, value in result.losses.items()}
        row |= {
            "train/gradient_norm": plan.gradient_norm,
            "train/learning_rate": plan.config.learning_rate * plan.rate_share(step - 1),
            "epoch": self.data.plan.epoch_of(step),
        }
        log_row(trainer.loggers, row | speeds, step)
        if trainer.is_global_zero:
            self._say(step, result, speeds, now)
        self.logged, self.cells, self.tokens, self.steps, self.flops = now, 0, 0, 0, 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that is not training: its time is not counted in the speeds."""
        began = time.perf_counter()
        yield
        self.logged += time.perf_counter() - began

    def on_exception(self, trainer: L.Trainer, plan: L.LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Take the bar away."""
        self._end()

    def teardown(self, trainer: L.Trainer, plan: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Take the bar away."""
        self._end()

    def _end(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _speeds(self, plan: TrainingPlan, seconds: float) -> dict[str, float]:
        """Cells and tokens of all devices, and this device's own work as a share of what it could do."""
        mfu = self.flops / seconds / peak_flops(plan.device, plan.config.precision)
        return {"cells_per_second": self.cells / seconds, "tokens_per_second": self.tokens / seconds, "mfu": mfu}

    def _say(self, step: int, result: StepResult, speeds: dict[str, float], now: float) -> None:
        cells, tokens, mfu = (speeds[name] for name in ("cells_per_second", "tokens_per_second", "mfu"))
        said = f"loss {result.losses['loss']:.4g}, {cells:,.0f} cells/s, {tokens:,.0f} tokens/s, MFU {mfu:.1%}"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, said=said)
        elif step == self.data.n_steps or step * _LINES // self.data.n_steps > (step - self.steps) * _LINES // self.data.n_steps:
            left = (now - self.began) / max(1, step - self.start) * (self.data.n_steps - step)
            log.info("step %d of %d: %s, %s left", step, self.data.n_steps, said, in_words(left))
