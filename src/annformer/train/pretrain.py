"""pretrain(): cells without labels in, a model that predicts expression out."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

import annformer
from annformer.baselines import gene_means
from annformer.data.source import CellSource
from annformer.data.store import StoreSource
from annformer.errors import input_error
from annformer.inference import evaluating
from annformer.model.config import ModelConfig
from annformer.model.ranks import n_ranks
from annformer.objectives.gep import GEP
from annformer.objectives.gepc import GEPC
from annformer.scgpt import ModelFolderConfig, ScGPT
from annformer.tokens import Encoded, TokenBatch
from annformer.train import checkpoint
from annformer.train.config import Machine, PretrainConfig
from annformer.train.datamodule import CellDataModule
from annformer.train.fit import fit, require_machine
from annformer.train.folder import RunFolder
from annformer.train.gene_init import co_expression, principal_axes, settle_untrained, start_genes_at, start_profile_at
from annformer.train.log import require_loggers
from annformer.train.plan import TrainingPlan
from annformer.train.ranks import is_first_on_node, is_first_rank, of_all_ranks, on_first_rank
from annformer.train.strategy import require_same_norm
from annformer.vocab import GeneVocab

log = logging.getLogger(__name__)

MANY = 100_000
"""Cells whose genes take long enough to count that it should be said."""
_WITHOUT_LABELS = ("gep", "gepc", "ecs", "cce")
_CELLS_OF_FLOORS = 5_000
"""Training cells from which the gene means are taken."""


@dataclass(frozen=True)
class Pretrained:
    """A finished pretraining run."""

    model: ScGPT
    history: pd.DataFrame
    """Losses by step, `train/...` and `validation/...`."""
    validation_rows: Int[np.ndarray, "cell"]
    """Rows of the source that were never trained on."""
    errors: dict[str, float]
    """Mean squared error (in value bins) on the held-out cells: `gep`, `gepc`, `gene mean`."""


def pretrain(
    source: CellSource,
    vocab: GeneVocab,
    config: PretrainConfig,
    folder: str | Path,
    *,
    name: str = "unnamed",
    machine: Machine | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Pretrained:
    """Train a model from scratch on the expression of cells, without any label (scGPT: generative pretraining).

    A run that was stopped or killed goes on where it was when the same call is made again, and ends with the same weights.

    Parameters
    ----------
    source
        Cells, best a `StoreSource`, whose shards are checked first; any other source is read into memory. Some are held out to measure
        the error.
    vocab
        Tokens of the model, special ones included.
    config
        The recipe.
    folder
        Gets `recipe.yaml`, `run.json`, `log.csv`, `checkpoints`, and in the end `model`.
    name
        What the model is called.
    machine
        Devices, nodes, strategy, loggers.
    overwrite
        Begin anew where `folder` holds a run.
    progress
        Called with the bytes of the store that are checked, and their total.

    Raises
    ------
    InputError
        When a shard is damaged or `folder` holds another run, before anything is written; when the disk is full; or when the loss stops
        being finite (naming the cells).
    """
    machine = machine or Machine()
    require_machine(machine)
    require_same_norm(machine, config.network(vocab))
    require_loggers(machine.loggers)
    run = RunFolder(Path(folder), config, source, vocab)
    run.check(overwrite=overwrite)
    _say_what_contrasts_nothing(config)
    if isinstance(source, StoreSource) and is_first_on_node():
        source.verify(progress)
    if source.n_obs > MANY:
        log.info("counting the genes of %s cells", f"{source.n_obs:,}")
    data = prepare_data(source, vocab, config)
    model = new_model(data.vocab, config)
    joined = _has_group()
    with run.held(overwrite=overwrite):
        history = _fit(model, data, config, run.path, machine, resume=not overwrite)
        done = _finish(run, data, history, name, source, device_of(machine))
    if _has_group() and not joined:  # made by the run; its threads, left alone, may abort the process when it ends
        torch.distributed.destroy_process_group()
    return done


def _say_what_contrasts_nothing(config: PretrainConfig) -> None:
    network = ModelConfig.model_validate({"vocab_size": 1} | config.model)
    contrasts = any(one.kind == "cce" and one.weight for one in config.objectives.values())
    if contrasts and not network.dropout and not network.attention_dropout:
        log.warning("CCE tells a cell from others by two readings under dropout, and model.dropout is 0: both will be the same")


def _has_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _fit(model: ScGPT, data: CellDataModule, config: PretrainConfig, folder: Path, machine: Machine, *, resume: bool) -> pd.DataFrame:
    if not resume or checkpoint.newest(folder / checkpoint.FOLDER) is None:
        start(model, data, config)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    n_cells, n_held_out = len(data.training_rows), len(data.validation_rows)
    log.info(
        "pretraining %s parameters on %s cells (%s held out) for %d steps",
        *map("{:,}".format, (n_parameters, n_cells, n_held_out)),
        data.n_steps,
    )
    return fit(TrainingPlan(model, config.train, data.n_steps), data, folder, machine, resume=resume)


def _finish(run: RunFolder, data: CellDataModule, history: pd.DataFrame, name: str, source: CellSource, device: torch.device) -> Pretrained:
    """Measure the model, all ranks together, and let the first one write it."""
    model = finished_model(run.path, data.vocab, run.config)
    errors = held_out_errors(model.to(device), data)
    model = model.to("cpu")
    model.config = model.config.with_(provenance={"name": name, **_provenance(run.config, data, errors, source)})
    on_first_rank(lambda: run.finish(model, history) if is_first_rank() else None)
    return Pretrained(model, history, data.validation_rows, errors)


def prepare_data(source: CellSource, vocab: GeneVocab, config: PretrainConfig) -> CellDataModule:
    """Split the cells, and mark the genes that too few training cells express as untrained: they are not read at all.

    Cells that without those genes have too few are left out, and the genes are counted again.
    """
    data = _data(source, vocab, config)
    while True:
        rare = _rare_genes(data, config.min_cells)
        if rare <= data.vocab.untrained:
            break
        rows = data.training_rows
        data = _data(source, GeneVocab(vocab.tokens, rare | vocab.untrained), config)
        if np.array_equal(data.training_rows, rows):
            break
    if n_new := len(data.vocab.untrained - vocab.untrained):
        log.info(
            "%s of %s genes are expressed by fewer than %d training cells: marked untrained",
            *map("{:,}".format, (n_new, len(vocab.genes))),
            config.min_cells,
        )
    return data


def _data(source: CellSource, vocab: GeneVocab, config: PretrainConfig) -> CellDataModule:
    if others := [name for name, one in config.objectives.items() if one.kind not in _WITHOUT_LABELS]:
        named = " and ".join(f"objectives.{name}" for name in others)
        found = f"the recipe has {named}, which learn from labels, or from what integration prepares"
        expected = f"objectives that need cells only: {', '.join(_WITHOUT_LABELS)}"
        raise input_error(found, expected, "leave them out here; `annformer annotate` and `annformer integrate` train with them")
    network = config.network(vocab)
    if network.n_batches or network.batch_context:
        found = "model.n_batches or model.batch_context in the recipe"
        raise input_error(found, "none: they are learned by fine-tuning", "leave them out here; see `annformer integrate`")
    return CellDataModule(source, vocab, config.tokenizer, config.train, profile=network.profile)


def _rare_genes(data: CellDataModule, min_cells: int) -> frozenset[str]:
    """Genes that fewer than `min_cells` training cells express."""
    vocab = data.vocab
    met = np.zeros(len(vocab), np.int64)
    for first in range(0, len(data.training_rows), 4096):
        cells = data.cells.rows(data.training_rows[first : first + 4096])
        met[cells.gene_ids] += np.bincount(cells.counts.indices, minlength=len(cells.gene_ids))
    return frozenset(vocab.tokens[i] for i in np.flatnonzero((met < min_cells) & vocab.is_gene))


def device_of(machine: Machine) -> torch.device:
    """Where this process computes."""
    return torch.device("cuda" if machine.accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def new_model(vocab: GeneVocab, config: PretrainConfig) -> ScGPT:
    """Build a model with random weights, the same ones for the same seed."""
    folder_config = ModelFolderConfig(model=config.network(vocab), tokenizer=config.tokenizer, objectives=config.objectives)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return ScGPT(folder_config, vocab)


def start(model: ScGPT, data: CellDataModule, config: PretrainConfig) -> None:
    """Start from what can be known without training: the mean value, and which genes go together."""
    tokens = data.training_tokens(512)
    mean = float(tokens.values[_are_genes(tokens)].mean())
    for objective in model.objectives.values():
        if isinstance(objective, GEP) and objective.config.loss == "mse":
            # the first thousand steps would go into learning one number
            last = objective.value[-1]
            assert isinstance(last, torch.nn.Linear), "a head ends with a linear layer"
            torch.nn.init.constant_(last.bias, mean)
    width = model.config.model.width
    if config.train.gene_init == "svd":
        log.info("placing genes by a singular value decomposition of the training cells")
        start_genes_at(model, co_expression(data.cells, data.training_rows, len(data.vocab), width, seed=config.train.seed))
    if model.encoder.profile is not None:
        log.info("beginning the profile at the principal axes of the training cells")
        axes, centre = principal_axes(data.cells, data.training_rows, len(data.vocab), width, seed=config.train.seed)
        start_profile_at(model.encoder.profile, axes, centre)


def finished_model(folder: Path, vocab: GeneVocab, config: PretrainConfig) -> ScGPT:
    """Read the weights of the last checkpoint, which are whole in it, however the run was spread over devices."""
    found = checkpoint.newest(folder / checkpoint.FOLDER)
    assert found is not None, "a run ends with a checkpoint"
    model = new_model(vocab, config)
    model.load_state_dict({key.removeprefix("model."): tensor for key, tensor in found[1]["state_dict"].items()})
    settle_untrained(model, vocab.is_trained)
    return model.eval()


def _provenance(config: PretrainConfig, data: CellDataModule, errors: dict[str, float], source: CellSource) -> dict[str, Any]:
    """What the model folder says about how the weights came about."""
    corpus = {}
    if isinstance(source, StoreSource):
        sources = [{"name": record.name, "cells": record.n_kept, "sha256": record.sha256} for record in source.manifest.sources]
        corpus = {"corpus": sources, "held_out_of_the_corpus": [record.name for record in source.manifest.held_out]}
    return {
        "made_by": f"annformer {annformer.__version__}, pretrained from scratch",
        "cells": {"trained on": len(data.training_rows), "held out": len(data.validation_rows)},
        "steps": data.n_steps,
        "recipe": json.loads(config.model_dump_json()),
        "held_out_squared_error": errors,
    } | corpus


def held_out_errors(model: ScGPT, data: CellDataModule) -> dict[str, float]:
    """Mean squared error, in bins, over the asked genes of held-out cells; every rank looks at its share of them.

    By method: `gep` and `gepc` where the model has them, and the floor `gene mean`, which predicts the mean bin of each gene over training
    cells that express it. A prediction that is not a number makes the error so too.
    """
    device = model.encoder.gene.weight.device
    seen = data.training_tokens(_CELLS_OF_FLOORS)
    genes = _are_genes(seen).numpy()
    floor = gene_means(seen.gene_ids.numpy()[genes], seen.values.numpy()[genes], len(model.vocab), smoothing=3.0)
    means = torch.from_numpy(floor).to(device)
    totals: defaultdict[str, float] = defaultdict(float)
    n_asked = 0
    rank, world = (torch.distributed.get_rank() if n_ranks() > 1 else 0), n_ranks()
    with evaluating(model), torch.inference_mode():
        for batch in data.validation_batches(rank, world):
            tokens = batch.to(device)
            encoded = model.encode(tokens, "targets")
            assert encoded.rows is not None and tokens.targets is not None
            target = tokens.targets[encoded.rows]
            known = torch.isfinite(target)
            n_asked += int(known.sum())
            for name, value in (_predictions(model, encoded, tokens) | {"gene mean": means[tokens.gene_ids[encoded.rows]]}).items():
                totals[name] += float(((value - target)[known] ** 2).sum())
    shares = of_all_ranks((dict(totals), n_asked))
    n_all = sum(n for _, n in shares)
    return {name: sum(part[name] for part, _ in shares) / n_all for name in totals}


def _are_genes(tokens: TokenBatch) -> Bool[Tensor, "token"]:
    """All tokens but the `<cls>` with which a cell begins."""
    genes = torch.ones(tokens.n_tokens, dtype=torch.bool)
    genes[tokens.offsets[:-1]] = False
    return genes


def _predictions(model: ScGPT, encoded: Encoded, tokens: TokenBatch) -> dict[str, Tensor]:
    predicted = {}
    for objective in model.objectives.values():
        if isinstance(objective, GEP):
            predicted["gep"] = objective.predict(encoded).value
        elif isinstance(objective, GEPC):
            predicted["gepc"] = objective.predict(encoded, tokens).value
    return predicted
