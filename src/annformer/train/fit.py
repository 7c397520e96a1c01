"""fit(): Lightning's Trainer as we use it, quiet, with one progress display and a CSV log."""

from __future__ import annotations

import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from annformer.train.datamodule import CellDataModule
from annformer.train.plan import TrainingPlan

log = logging.getLogger(__name__)

_NOISE = ("does not have many workers", "can be set to", "`isinstance(treespec, LeafSpec)`", "srun", "Experiment logs directory")
"""Lightning's remarks that do not concern a run planned by us."""


def fit(plan: TrainingPlan, data: CellDataModule, folder: str | Path) -> pd.DataFrame:
    """Run `data.n_steps` training steps, with a validation before the first and after every epoch.

    Parameters
    ----------
    folder
        Gets `log.csv`.

    Returns
    -------
    The log: a row per step that logged something, columns `step`, `train/...`, `validation/...`.
    """
    folder = Path(folder)
    logger = CSVLogger(folder, name="", version="log", flush_logs_every_n_steps=10**9)
    with _quiet():
        trainer = L.Trainer(
            max_steps=data.n_steps,
            max_epochs=-1,
            accelerator="auto",
            devices=1,
            logger=logger,
            log_every_n_steps=1,
            val_check_interval=data.steps_per_epoch,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=plan.config.clip_norm,
            callbacks=[_ProgressLines(data)],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.validate(plan, data, verbose=False)
        trainer.fit(plan, data)
    return _collect(Path(logger.log_dir), folder / "log.csv")


class _ProgressLines(L.Callback):
    """A bar on a terminal; elsewhere about ten log lines."""

    def __init__(self, data: CellDataModule) -> None:
        self.data = data
        self.began = 0.0
        self.cells = 0
        self.bar: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, plan: L.LightningModule) -> None:  # noqa: ARG002
        self.began = time.perf_counter()
        if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.add_task("training", total=self.data.n_steps, said="")
            self.bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, plan: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        self.cells += batch.n_cells
        done, n_steps = batch_idx + 1, self.data.n_steps
        rate = self.cells / (time.perf_counter() - self.began)
        said = f"loss {float(outputs['loss']):.3g}, {rate:,.0f} cells/s"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, said=said)
        elif done % max(1, n_steps // 10) == 0:
            left = (time.perf_counter() - self.began) / done * (n_steps - done)
            log.info("step %d of %d: %s, %.0f s left", done, n_steps, said, left)

    def teardown(self, trainer: L.Trainer, plan: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's banner, tips and the warnings of `_NOISE`, for as long as the run lasts."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for text in _NOISE:
                warnings.filterwarnings("ignore", message=f".*{re.escape(text)}")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _collect(log_dir: Path, target: Path) -> pd.DataFrame:
    """Move Lightning's table out of its folder, one row per step."""
    table = pd.read_csv(log_dir / "metrics.csv").drop(columns="epoch").groupby("step", as_index=False).first()
    for path in log_dir.iterdir():
        path.unlink()
    log_dir.rmdir()
    table.to_csv(target, index=False)
    return table
