"""The folder of a run: which run it is, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import ValidationError

import annformer
from annformer.data.partial import hold
from annformer.data.source import CellSource
from annformer.data.store import StoreSource
from annformer.errors import InputError, input_error
from annformer.scgpt import ScGPT
from annformer.train import checkpoint
from annformer.train.config import PretrainConfig
from annformer.train.curves import draw_curves
from annformer.train.log import FILE as LOG
from annformer.train.ranks import is_first_rank
from annformer.vocab import GeneVocab

FORMAT = 1
_PATIENCE = 3.0
"""Seconds in which the loading processes of a run that was killed are gone."""

RUN, RECIPE, MODEL, CURVES = "run.json", "recipe.yaml", "model", "curves.png"
FILES = (RUN, RECIPE, LOG, checkpoint.FOLDER, MODEL, CURVES, "tensorboard", "wandb")
"""Everything that a run writes, first what tells that a folder is that of a run."""


MAY_CHANGE = tuple(
    f"train.{name}"
    for name in (
        *("validations", "hold_out.n_cells", "log_steps", "checkpoint_minutes", "checkpoint_steps", "keep_checkpoints"),
        "workers",
    )
)
"""Settings that do not decide what is learned, so that another machine may go on with a run. `tokens_per_forward` does: it cuts a step into
turns, each with dropout of its own, and some objectives see the cells of one turn."""


class RunFolder:
    """Where a run keeps its state; the same recipe and cells go on in it, others are refused.

    Parameters
    ----------
    path
        The folder.
    config
        The recipe.
    source
        The cells.
    vocab
        The tokens, whose place decides which row of the weights a gene has.
    """

    def __init__(self, path: Path, config: PretrainConfig, source: CellSource, vocab: GeneVocab) -> None:
        self.path = path
        self.config = config
        self.cells = _cells(source, vocab)

    def check(self, *, overwrite: bool = False) -> None:
        """See that there is nothing, or this very run, unfinished; or any run, if it is to be overwritten. Writes nothing.

        Raises
        ------
        InputError
            When there is something else, or the run is finished.
        """
        if not is_first_rank():  # which looks, and perhaps writes, at the same time
            return
        if self.path.exists() and not self.path.is_dir():
            found = f"{self.path} is a file"
            raise input_error(found, "a folder for the run", "give another path")
        there = sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []
        strange = [name for name in there if not name.startswith(".") and (RUN not in there or name not in FILES)]
        if strange and (overwrite or RUN not in there):
            found = f"{self.path} holds {', '.join(strange[:5])}, which no run wrote"
            raise input_error(found, "a new or empty folder, or that of a run and nothing else", "give another path")
        if overwrite or RUN not in there:
            return
        self._require_same(_read_run(self.path / RUN))
        if MODEL in there:
            found = f"the run in {self.path} is finished"
            remedy = f"its model is {self.path / MODEL}; to train again give another path, or overwrite it (--overwrite)"
            raise input_error(found, "an unfinished run to go on with, or a new folder", remedy)

    @contextmanager
    def held(self, *, overwrite: bool = False) -> Iterator[None]:
        """Make the folder, or go on in it, with other processes kept out of it."""
        if not is_first_rank():
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = _hold(self.path)
        try:
            self.check(overwrite=overwrite)
            self._clear(everything=overwrite)
            self._describe()
            yield
        finally:
            os.close(lock)

    def finish(self, model: ScGPT, history: pd.DataFrame) -> None:
        """Write the model, and draw the curves where matplotlib is there to do so."""
        draw_curves(history, self.path / CURVES)
        model.save_pretrained(self.path / MODEL)

    def _clear(self, *, everything: bool) -> None:
        """Delete what a killed process left half written, or all; what tells that this is a run goes last."""
        paths = [*self.path.glob(".*.partial"), *((self.path / name for name in reversed(FILES)) if everything else ())]
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _describe(self) -> None:
        recipe = json.loads(self.config.model_dump_json())
        described = {"format": FORMAT, "annformer": annformer.__version__, "recipe": recipe, "cells": self.cells}
        if not (self.path / RUN).exists():
            _write(self.path / RUN, json.dumps(described, indent=1) + "\n")
        if not (self.path / RECIPE).exists():
            _write(self.path / RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))

    def _require_same(self, before: dict[str, Any]) -> None:
        recipe = json.loads(self.config.model_dump_json())
        before["cells"].setdefault("vocab", self.cells["vocab"])  # a run from before it was noted
        changes = _changes(before["recipe"], recipe, "") + _changes(before["cells"], self.cells, "cells.")
        changes = [line for line in changes if line.partition(":")[0] not in MAY_CHANGE]
        if changes:
            found = f"{self.path} holds a run of another recipe or other cells:\n" + "\n".join(f"  {line}" for line in changes[:10])
            remedy = "go on with what the run began with (it stands in its recipe.yaml), give another path, or overwrite it (--overwrite)"
            raise input_error(found, "the same run, to go on with it", remedy)


def _read_run(path: Path) -> dict[str, Any]:
    """What a run is, with what its recipe left to the defaults of today."""
    remedy = "give another path, or overwrite the run (--overwrite)"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        found = f"{path} is damaged: it is not JSON ({error})"
        raise input_error(found, "the file as annformer wrote it", remedy) from None
    if not (isinstance(run, dict) and run.get("format") == FORMAT and run.keys() >= {"recipe", "cells", "annformer"}):
        found = f"{path} does not describe a run in format {FORMAT}"
        raise input_error(found, "a run of this version of annformer", remedy)
    try:
        recipe = PretrainConfig.model_validate(run["recipe"])
    except ValidationError:
        found = f"{path} has a recipe that this version of annformer does not read: it was written by version {run['annformer']}"
        raise input_error(found, "a run of this version", f"go on with version {run['annformer']}, or {remedy}") from None
    return run | {"recipe": json.loads(recipe.model_dump_json())}


def _hold(path: Path) -> int:
    """Keep other processes out; the loading processes of a run that was just killed let go soon."""
    give_up = time.monotonic() + _PATIENCE
    while True:
        try:
            return hold(path, path)
        except InputError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.5)


def _cells(source: CellSource, vocab: GeneVocab) -> dict[str, Any]:
    known = {"n": source.n_obs, "vocab": hashlib.sha256("\n".join(vocab.tokens).encode()).hexdigest()}
    if isinstance(source, StoreSource):
        manifest = source.manifest
        measured = None if manifest.measured is None else manifest.measured.sha256
        return known | {"shards": [shard.sha256 for shard in manifest.shards], "measured": measured}
    return known


def _changes(before: Any, now: Any, where: str) -> list[str]:
    """Lines about what differs between two nested settings."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        return [line for name in names for line in _changes(before.get(name), now.get(name), f"{where}{name}.")]
    return [] if before == now else [f"{where.rstrip('.')}: {_short(before)} there, {_short(now)} here"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:56] + " ..."


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
