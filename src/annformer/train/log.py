"""Where the numbers of a run go: a table that survives a crash, and the loggers that people ask for by name."""

from __future__ import annotations

import csv
import secrets
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from annformer.errors import input_error
from annformer.train.checkpoint import cannot_write
from annformer.train.ranks import on_first_rank

FILE = "log.csv"
_INSTALL = {"tensorboard": "'annformer[tensorboard]'", "wandb": "wandb"}


class CSVLog(Logger):
    """Rows by step in `log.csv`, written when they come.

    Parameters
    ----------
    folder
        Of the run.
    start
        Steps that had been made when this process began: rows of later ones, of a run that was killed, are taken out.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        super().__init__()
        self.path = folder / FILE
        self._prepared = False
        self._start = start
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Runs are told apart by their folders."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row; what is cut off when the disk is full is taken out when the run goes on."""
        row: dict[str, Any] = {"step": step} | metrics
        try:
            self._prepare()
            if new := [name for name in row if name not in self._columns]:
                self._rewrite(self._read(), [*self._columns, *new])
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the recipe stands beside the table."""

    def _prepare(self) -> None:
        if self._prepared:
            return
        self._prepared = True
        rows = [row for row in self._read() if int(row["step"]) <= self._start] if self._start else []
        self._rewrite(rows, list(rows[0]) if rows else ["step"])

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
            # a row that a crash cut off has too few fields
            return [row for row in csv.DictReader(file) if None not in (*row, *row.values()) and row["step"].isdigit()]

    def _rewrite(self, rows: Sequence[dict[str, str]], columns: list[str]) -> None:
        self._columns = columns
        beside = self.path.with_name(f".{self.path.name}.partial")
        try:
            with beside.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)


def require_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose package is not installed."""
    for name in names:
        if name != "csv" and find_spec(name) is None:
            found = f"the logger {name} needs the package {name}, which is not installed"
            remedy = f"pip install {_INSTALL[name]}, or leave it out: log.csv has the same numbers"
            raise input_error(found, "an installed logger", remedy)


def loggers(names: Sequence[str], folder: Path, start: int) -> list[Logger]:
    """Build the loggers of a run; the table is always among them."""
    require_loggers(names)
    made: list[Logger] = [CSVLog(folder, start)]
    if "tensorboard" in names:
        made.append(TensorBoardLogger(folder, name="tensorboard", version="", purge_step=start + 1 if start else None))
    if "wandb" in names:
        made.append(
            WandbLogger(save_dir=folder, name=folder.name, id=_wandb_id(folder / "wandb" / "run-id"), resume="allow", project="annformer")
        )
    return made


def log_row(loggers: Sequence[Logger], row: Mapping[str, float], step: int) -> None:
    """Give a row to every logger; all ranks call it, the first one writes, and where it cannot all of them end."""

    def write() -> None:
        for logger in loggers:
            logger.log_metrics(dict(row), step)

    on_first_rank(write)


def _wandb_id(path: Path) -> str:
    """Name under which wandb knows this run, and no other, when it goes on."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def read_log(folder: Path) -> pd.DataFrame:
    """Read the table of a run: a row per step that logged something, columns `step`, `train/...`, `validation/...`."""
    return pd.read_csv(folder / FILE).groupby("step", as_index=False).first()
