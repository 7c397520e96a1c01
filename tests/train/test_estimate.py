"""What a run would take, said before it starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from annformer.data.store import StoreSource
from annformer.data.store_writer import write_store
from annformer.errors import InputError
from annformer.train.config import Machine, PretrainConfig
from annformer.train.estimate import Estimate, estimate, forward_tokens
from annformer.train.pretrain import new_model, prepare_data

RECIPE = {
    "model": {"width": 16, "n_heads": 2, "n_layers": 1, "ff_width": 16},
    "train": {"epochs": 3, "tokens_per_step": 4096, "tokens_per_forward": 2048, "hold_out": {"share": 0.2}},
}


@pytest.fixture(scope="module")
def store(tiny_adata, tmp_path_factory) -> StoreSource:  # type: ignore[no-untyped-def]
    folder: Path = tmp_path_factory.mktemp("estimate")
    tiny_adata(100).write_h5ad(folder / "cells.h5ad")
    write_store([str(folder / "cells.h5ad")], folder / "store")
    return StoreSource(folder / "store")


@pytest.fixture(scope="module")
def config() -> PretrainConfig:
    return PretrainConfig.read(RECIPE, where="test")


def test_numbers_are_those_of_the_run(store: StoreSource, config: PretrainConfig) -> None:
    made = estimate(store, config, Machine(accelerator="cpu"), price_per_hour=2.0)
    model = new_model(store.vocab, config)
    assert made.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (made.n_cells, made.n_held_out) == (80, 20)
    assert made.turns == 2
    assert made.n_steps == 3 * made.steps_per_epoch
    assert made.n_steps == prepare_data(store, store.vocab, config).n_steps
    # every gene of a training cell is a token, and its <cls>
    total = int(store.lengths.sum()) + 100
    assert 0.6 * total < made.tokens_per_epoch < total
    assert 0 < made.mfu < 1
    assert made.seconds_per_epoch > 0


def test_genes_that_will_not_be_read_are_not_counted(store: StoreSource) -> None:
    batch = store.rows(np.arange(store.n_obs))
    often = int(np.median(np.bincount(batch.counts.indices)))
    config = PretrainConfig.read(RECIPE | {"min_cells": often // 2}, where="test")
    made, data = estimate(store, config, Machine(accelerator="cpu")), prepare_data(store, store.vocab, config)
    assert data.vocab.untrained
    assert made.n_steps == data.n_steps
    assert made.tokens_per_epoch == data.plan.tokens_until(data.plan.steps_per_epoch)
    every = PretrainConfig.read(RECIPE | {"min_cells": 0}, where="test")
    assert made.tokens_per_epoch < estimate(store, every, Machine(accelerator="cpu")).tokens_per_epoch


def test_processes_of_a_cpu_share_turns_and_cores(store: StoreSource, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # which a run on the CPU leaves alone
    assert estimate(store, config, Machine(accelerator="cpu")).n_devices == 1
    made = estimate(store, config, Machine(accelerator="cpu", devices=2, nodes=3))
    assert (made.n_devices, made.n_apart) == (6, 3)
    assert made.turns == 1
    assert "6 x process" in "\n".join(made.lines())
    assert "sharing its cores: as fast as 3" in "\n".join(made.lines())


def test_more_devices_than_cells_in_a_step_are_refused(store: StoreSource, config: PretrainConfig) -> None:
    with pytest.raises(InputError, match="to be dealt to 500 parts"):
        estimate(store, config, Machine(accelerator="cpu", devices=500))


def test_looks_at_held_out_cells_take_their_time(store: StoreSource, config: PretrainConfig) -> None:
    without = PretrainConfig.read(RECIPE | {"train": RECIPE["train"] | {"validations": 0}}, where="test")
    assert estimate(store, without, Machine(accelerator="cpu")).validation_seconds == 0
    data = prepare_data(store, store.vocab, config)
    looked_at = int(data.n_tokens[data.validation_rows].sum())
    assert forward_tokens(data) == 21 * 3 * looked_at  # validations of three asked shares
    assert estimate(store, config, Machine(accelerator="cpu")).validation_seconds > 0


def test_a_large_turn_is_measured_by_some_of_its_cells(store: StoreSource, config: PretrainConfig) -> None:
    data = prepare_data(store, store.vocab, config)
    whole = max(data.step_batches(0, 0, 1), key=lambda turn: turn.n_tokens)
    same, n_whole = data.some_of(0, 1, 10**9)
    assert (same.n_cells, same.n_tokens, n_whole) == (whole.n_cells, whole.n_tokens, whole.n_tokens)
    some, n_whole = data.some_of(0, 1, whole.n_tokens // 3)
    assert some.check().n_cells == whole.n_cells // 3
    assert n_whole == whole.n_tokens
    one, _ = data.some_of(0, 1, 0)
    assert one.n_cells == 1


def test_lines_say_time_and_cost() -> None:
    made = Estimate(
        n_parameters=51_000_000,
        n_gene_parameters=31_000_000,
        n_cells=33_000_000,
        n_held_out=1000,
        tokens_per_epoch=10**10,
        steps_per_epoch=1000,
        n_steps=6000,
        turns=1,
        flops_per_epoch=8.6e18,
        device="H100",
        seconds_per_epoch=7200.0,
        validation_seconds=3600.0,
        mfu=0.4,
        working_bytes=4 * 10**9,
        free_bytes=4 * 10**9,
        n_devices=8,
        n_apart=8,
        price_per_hour=2.5,
        epochs=6,
    )
    text = "\n".join(made.lines())
    assert "13.0 h in all" in text
    assert "40.00 an epoch, 260.00 in all" in text
    assert "4.8 GB are more than this device has free (4.0 GB)" in text
    assert "0.8 GB for parameters and optimizer" in text
    assert "8 x H100" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(store: StoreSource, config: PretrainConfig) -> None:
    with pytest.raises(InputError, match="torch sees none"):
        estimate(store, config, Machine(accelerator="cuda"))
