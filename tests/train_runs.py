"""One of several processes of test_distributed.py: makes the runs that a file tells, one after the other."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from annformer.data.store import StoreSource
from annformer.errors import InputError
from annformer.train.config import Machine, PretrainConfig
from annformer.train.datamodule import CellDataModule
from annformer.train.fit import RunStopped, fit
from annformer.train.plan import TrainingPlan
from annformer.train.pretrain import new_model
from annformer.train.ranks import SaidElsewhere


class Interrupted(TrainingPlan):
    """Gets a signal in its fifth step, on the second rank only."""

    def training_step(self, batch, index) -> None:
        if batch[0] == 4 and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        super().training_step(batch, index)


class Unwritable(TrainingPlan):
    """Finds a folder where the log was, in its fifth step, as a disk may refuse to be written to at any time."""

    def training_step(self, batch, index) -> None:
        if batch[0] == 4 and self.global_rank == 0:
            path = Path(self.trainer.loggers[0].path)
            path.unlink()
            path.mkdir()
        super().training_step(batch, index)


PLANS = {"interrupt": Interrupted, "log": Unwritable}


def make(run: dict[str, Any]) -> None:
    """Train as `run` tells, with NaN in the row of the gene that `poison` names."""
    store = StoreSource(run["store"])
    config = PretrainConfig.read(run["recipe"], where="test")
    model = new_model(store.vocab, config)
    if model.encoder.profile is not None:  # that begins at nothing, so that nothing would be seen of it
        with torch.no_grad():
            model.encoder.profile.gene.weight.copy_(model.encoder.gene.weight)
    profile = config.network(store.vocab).profile
    data = CellDataModule(store, store.vocab, config.tokenizer, config.train, label_keys=run.get("labels"), profile=profile)
    if gene := run.get("poison"):
        with torch.no_grad():
            model.encoder.gene.weight[store.vocab[gene]] = torch.nan
    plan = PLANS.get(run.get("plan"), TrainingPlan)(model, config.train, data.n_steps)
    out = Path(run["out"])
    (out / "log.csv" if run.get("no_log") else out).mkdir(exist_ok=True, parents=True)
    fit(plan, data, out, Machine(accelerator="cpu", **run.get("machine", {})))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        try:
            make(run)
        except (InputError, RunStopped, SaidElsewhere) as error:
            Path(run["out"], f"end-{os.environ['RANK']}.txt").write_text(f"{type(error).__name__} {error}")
