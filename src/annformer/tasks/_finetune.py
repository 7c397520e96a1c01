"""What the estimators share: a pretrained network grown into one for a task, and trained on cells in memory."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from torch import Tensor

from annformer.durations import in_words
from annformer.errors import input_error
from annformer.scgpt import ModelFolderConfig, ScGPT
from annformer.tasks._threads import torch_threads
from annformer.train.checkpoint import FOLDER
from annformer.train.config import Machine
from annformer.train.datamodule import CellDataModule
from annformer.train.estimate import FORWARD_SHARE, forward_tokens, measure
from annformer.train.fit import RunStopped, fit
from annformer.train.plan import TrainingPlan
from annformer.vocab import GeneVocab

log = logging.getLogger(__name__)

JOB = "job.json"
FEW_STEPS, FEW_TOKENS = 100, 1_000_000
"""Up to here a run is as short as the measurement of its steps."""


def loaded(model: ScGPT | str | Path) -> ScGPT:
    """The model itself, or the one of that name, on the CPU.

    Raises
    ------
    InputError
        When it was fine-tuned for a task already: its batches and its panel are not those of other cells.
    """
    base = model if isinstance(model, ScGPT) else ScGPT.from_pretrained(model)
    if base.panel is not None or base.config.model.n_batches:
        found = f"the model {base.name} is fine-tuned already"
        raise input_error(found, "a pretrained model", "begin with the one that it was made from")
    return base


def made_for(task: str, model: ScGPT, folder: str | Path, written_by: str) -> dict[str, Any]:
    """Provenance of a model of this task.

    Raises
    ------
    InputError
        When it was made for another one, or for none.
    """
    made = model.config.provenance
    if made.get("task") != task:
        other = made.get("task", "no task: it is a pretrained one")
        found = f"the model in {folder} was made for {other}"
        raise input_error(found, f"a model that {written_by} wrote", "give its folder")
    return made


def grown(base: ScGPT, config: ModelFolderConfig, vocab: GeneVocab, *, pretrained: bool, seed: int) -> ScGPT:
    """Build a model of `config` that begins as `base` does.

    A tensor that has grown (a head that reads a context as well) gets the old one as its first block and zeros beside it, so that the
    function is the old one until training finds a use for the new inputs. What is new is random, or starts at what its module says.

    Parameters
    ----------
    pretrained
        False: take nothing from `base`: the same network from scratch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ScGPT(config, vocab)
    if pretrained:
        old = base.state_dict()
        model.load_state_dict({name: _begun(new, old.get(name)) for name, new in model.state_dict().items()})
    return model


def _begun(new: Tensor, old: Tensor | None) -> Tensor:
    if old is None or old.ndim != new.ndim or any(was > now for was, now in zip(old.shape, new.shape, strict=True)):
        return new
    begun = torch.zeros_like(new) if old.shape != new.shape else new.clone()
    begun[tuple(slice(0, was) for was in old.shape)] = old.to(new.dtype)
    return begun


def trained(
    model: ScGPT, data: CellDataModule, *, folder: Path | None, job: Mapping[str, Any], device: str | None, threads: int | None
) -> pd.DataFrame:
    """Train in place; return the log.

    Parameters
    ----------
    folder
        Where checkpoints go, so that the same call goes on after a kill; None: into a temporary one.
    job
        What must be the same for a run to go on.
    """
    place = _device(device)
    machine = Machine(accelerator="cuda" if place.type == "cuda" else "cpu", devices=1)
    with _run_folder(folder, job) as path, torch_threads(threads):
        if data.n_steps > FEW_STEPS or data.plan.tokens_until(data.n_steps) > FEW_TOKENS:
            log.info("%s", expected(model, data, place))
        return fit(TrainingPlan(model, data.config, data.n_steps), data, path, machine)


def _device(name: str | None) -> torch.device:
    """Where to train: the CPU or the first GPU."""
    if name not in (None, "cpu", "cuda", "cuda:0"):
        found = f"device {name!r}"
        raise input_error(found, "'cpu' or 'cuda'", "choose the GPU by CUDA_VISIBLE_DEVICES, and say cuda")
    return torch.device(name or "cpu")


def expected(model: ScGPT, data: CellDataModule, device: torch.device) -> str:
    """Say what training, and embedding the cells after it, will take, from a few steps of a copy."""
    found = measure(copy.deepcopy(model).to(device), data, device, 1)
    forwards = forward_tokens(data) + int(data.n_tokens.sum())
    needed = found.seconds_of(data.plan.tokens_until(data.n_steps)) + found.seconds / found.n_tokens * FORWARD_SHARE * forwards
    memory = psutil.Process().memory_info().rss + found.working_bytes + 12 * sum(parameter.numel() for parameter in model.parameters())
    shorter = f"; shorter with fewer epochs (train.epochs, now {data.config.epochs:g}) or tokens (train.max_length)" if needed > 120 else ""
    return f"about {in_words(needed)} for {data.n_steps:,} steps and the embedding, {memory / 1e9:.1f} GB of memory{shorter}"


@contextmanager
def _run_folder(folder: Path | None, job: Mapping[str, Any]) -> Iterator[Path]:
    if folder is None:
        try:
            with tempfile.TemporaryDirectory(prefix="annformer-") as name:
                yield Path(name)
        except RunStopped:  # which says that something is saved
            found = "stopped before the end; nothing of this fine-tuning is kept"
            remedy = "begin again; with fit(..., folder=...), as the commands do it, the next call goes on where this one stopped"
            raise RunStopped(str(input_error(found, "to run to the end", remedy))) from None
        return
    new = not folder.exists()
    require_same_job(folder, job)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB).write_text(json.dumps(job, sort_keys=True), encoding="utf-8")
    try:
        yield folder
    except BaseException:
        if new and not _has_checkpoints(folder):  # nothing to go on from; a folder that was there may hold other things
            shutil.rmtree(folder, ignore_errors=True)
        raise


def require_same_job(folder: Path | None, job: Mapping[str, Any]) -> None:
    """Refuse to go on with the training of something else; what stopped before its first checkpoint has nothing to lose.

    Raises
    ------
    InputError
        When another job has left checkpoints in `folder`.
    """
    if folder is None or not (folder / JOB).is_file() or not _has_checkpoints(folder):
        return
    if (folder / JOB).read_text(encoding="utf-8") != json.dumps(job, sort_keys=True):
        found = f"{folder} holds the training of other cells, or with another model, recipe or seed"
        raise input_error(found, "the same call as before, to go on with", f"repeat that call, or remove {folder} to begin anew")


def _has_checkpoints(folder: Path) -> bool:
    return any((folder / FOLDER).glob("*.ckpt"))
