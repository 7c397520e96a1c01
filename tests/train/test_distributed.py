"""Several processes do what one does, with DDP and with FSDP2. The processes speak by gloo, as torchrun would have started them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from annformer.data.store import StoreSource
from annformer.data.store_writer import write_store
from annformer.errors import InputError
from annformer.train.config import Machine
from annformer.train.strategy import placement, require_same_norm
from train_runs import make

N_STEPS = 20
NETWORK = {"width": 16, "n_heads": 2, "n_layers": 2, "ff_width": 16, "dropout": 0.0, "profile": True}
COUPLED = {
    "ecs": {"kind": "ecs"},
    "cce": {"kind": "cce"},
    "cls": {"kind": "cls", "n_classes": 3},
    "dar": {"kind": "dar", "n_batches": 2},
    "gepc": {"kind": "gepc"},
}
STRATEGIES = ("ddp", "fsdp")
POISON = "CD79B"


def recipe(objectives=None, network=None, **train):
    train = {
        "epochs": 1.82,
        "validations": 2,
        "log_steps": 1,
        "learning_rate": 0.005,
        "checkpoint_steps": 10,
        "keep_checkpoints": 9,
    } | train
    train = {"tokens_per_step": 1000, "tokens_per_forward": 1000} | train
    made = {"model": NETWORK | (network or {}), "train": train, "tokenizer": {"max_length": 100}}
    return made | ({"objectives": objectives} if objectives else {})


PLAIN, PLAIN_IN_TURNS = recipe(), recipe(tokens_per_forward=250)
HALF = {precision: recipe(epochs=0.5, precision=precision) for precision in ("bf16", "fp16")}
DOMAINS = recipe(COUPLED, {"input_norm": "domain", "n_batches": 2})
LABELS = {"cell_type": "cell_type", "batch": "study"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def store(tiny_adata, folder) -> Path:
    for name, seed in (("blood", 0), ("lung", 1)):
        tiny_adata(70, seed=seed).write_h5ad(folder / f"{name}.h5ad")
    write_store([folder / "blood.h5ad", folder / "lung.h5ad"], folder / "store")
    return folder / "store"


def cut_off(source: Path, out: Path, step: int) -> Path:
    """Copy a run as if it had been killed after its checkpoint of a step."""
    shutil.copytree(source, out)
    for path in (out / "checkpoints").iterdir():
        if path.name > f"step-{step:09d}.ckpt":
            path.unlink()
    assert list((out / "checkpoints").iterdir())
    return out


@pytest.fixture(scope="module")
def runs(store, folder):
    """Every run, by name: first those of one process, then those of two, then those that one goes on with."""
    made = {}

    def plan(name, recipe, **more):
        made[name] = told(store, folder / name, recipe, **more)
        return made[name]

    for run in (plan("one", PLAIN), plan("one-domains", DOMAINS, labels=LABELS)):
        make(run)
    together = []
    for strategy in STRATEGIES:
        machine = {"machine": {"strategy": strategy}}
        cut_off(folder / "one", folder / f"{strategy}-goes-on", 10)
        together += [
            plan(strategy, PLAIN_IN_TURNS, **machine),
            plan(f"{strategy}-domains", DOMAINS, labels=LABELS, **machine),
            plan(f"{strategy}-goes-on", PLAIN_IN_TURNS, **machine),
            plan(f"{strategy}-nan", PLAIN_IN_TURNS, poison=POISON, **machine),
            plan(f"{strategy}-signal", PLAIN_IN_TURNS, plan="interrupt", **machine),
            plan(f"{strategy}-log", PLAIN_IN_TURNS, plan="log", **machine),
            plan(f"{strategy}-no-log", PLAIN_IN_TURNS, no_log=True, **machine),
        ]
    start_two(together, folder)
    for strategy in STRATEGIES:
        cut_off(folder / strategy, folder / f"one-after-{strategy}", 10)
        make(plan(f"one-after-{strategy}", PLAIN))
    return {name: Path(run["out"]) for name, run in made.items()}


def told(store, out, recipe, **more):
    return {"store": str(store), "out": str(out), "recipe": recipe} | more


def start_two(runs, folder) -> None:
    (folder / "runs.json").write_text(json.dumps(runs))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parents[1] / "train_runs.py"), str(folder / "runs.json")]
    processes = []
    for rank in ("0", "1"):
        with (folder / f"said-{rank}.txt").open("w") as said:
            environment = os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}
            processes.append(subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT))
    try:
        ends = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert ends == [0, 0], "\n".join((folder / f"said-{rank}.txt").read_text()[-3000:] for rank in (0, 1))


def losses(run: Path, part: str = "train") -> pd.DataFrame:
    log = pd.read_csv(run / "log.csv").groupby("step").first()
    return log.filter(regex=f"^{part}/(?!learning)").dropna(how="all")


def assert_same_losses(run: Path, reference: Path, part: str = "train", rtol: float = 1e-6) -> None:
    pd.testing.assert_frame_equal(losses(run, part), losses(reference, part), rtol=rtol, atol=0, check_like=True)


def weights(run: Path) -> dict[str, torch.Tensor]:
    last = max((run / "checkpoints").iterdir())
    return torch.load(last, weights_only=True)["state_dict"]


def assert_same_weights(run: Path, reference: Path) -> None:
    ours, theirs = weights(run), weights(reference)
    assert ours.keys() == theirs.keys()
    apart = torch.cat([(ours[name].double() - theirs[name].double()).abs().flatten() for name in ours])
    assert apart.mean() < 1e-5  # AdamW makes whole steps of gradients that are nearly nought, so single weights may be further apart


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_in_turns_give_the_losses_and_weights_of_one(runs, strategy):
    assert list(losses(runs["one"]).index) == list(range(1, N_STEPS + 1))
    assert_same_losses(runs[strategy], runs["one"])
    assert_same_losses(runs[strategy], runs["one"], "validation")
    assert_same_weights(runs[strategy], runs["one"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_objectives_that_couple_cells_see_those_of_all_processes(runs, strategy):
    assert {"train/ecs", "train/cce", "train/cls", "train/dar"} < set(losses(runs["one-domains"]))
    assert_same_losses(runs[f"{strategy}-domains"], runs["one-domains"])
    assert_same_weights(runs[f"{strategy}-domains"], runs["one-domains"])


@pytest.mark.parametrize("name", ["ddp-goes-on", "fsdp-goes-on", "one-after-ddp", "one-after-fsdp"])
def test_another_number_of_processes_goes_on_with_a_run(runs, name):
    assert_same_losses(runs[name], runs["one"])
    assert_same_weights(runs[name], runs["one"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_ends_all_processes_and_names_the_cells_of_both(runs, strategy, store):
    run = runs[f"{strategy}-nan"]
    said, other = (Path(run / f"end-{rank}.txt").read_text() for rank in (0, 1))
    assert said.startswith("InputError the loss of step 0 is not finite")
    assert other == "SaidElsewhere 0"
    source = StoreSource(store)
    first = [name for rank in (0, 1) for name in cells_with(source, POISON, rank)]
    assert len(first) > 1
    named = said.partition("the cells are ")[2].partition(".\n")[0].partition(" and ")[0].split(", ")
    assert set(named) <= set(first)
    assert len(named) == min(10, len(first))


def cells_with(source, gene, rank) -> list[str]:
    """Cells of the first step that express a gene."""
    from annformer.train.config import PretrainConfig
    from annformer.train.datamodule import CellDataModule

    config = PretrainConfig.read(PLAIN_IN_TURNS, where="test")
    data = CellDataModule(source, source.vocab, config.tokenizer, config.train, profile=True)
    found = []
    for turn, tokens in enumerate(data.step_batches(0, rank, 2)):
        cells = tokens.cell_of_token()[tokens.gene_ids == source.vocab[gene]]
        found += [data.names_of(0, rank, 2, turn)[cell] for cell in cells]
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_signal_to_one_process_stops_all_after_one_checkpoint(runs, strategy):
    run = runs[f"{strategy}-signal"]
    assert (run / "end-0.txt").read_text().startswith(f"RunStopped stopped after step 5 of {N_STEPS}")
    assert (run / "end-1.txt").read_text() == "SaidElsewhere 0"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000005.ckpt"]
    assert list(losses(run).index) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["no-log", "log"])
def test_a_log_that_cannot_be_written_ends_all_processes(runs, strategy, name):
    """The first one writes it: before training, with the first validation, and in the middle."""
    run = runs[f"{strategy}-{name}"]
    said, other = (Path(run / f"end-{rank}.txt").read_text() for rank in (0, 1))
    assert said.startswith(f"InputError {run / 'log.csv'} cannot be written")
    assert other == "SaidElsewhere 0"


@pytest.mark.parametrize(
    ("machine", "norm"), [({"devices": 2}, "batch"), ({"nodes": 2}, "batch"), ({"devices": 2}, "domain"), ({}, "batch")]
)
def test_a_norm_of_each_process_alone_is_refused_where_there_are_several(tiny_model, machine, norm):
    network = tiny_model.config.model.with_(input_norm=norm, n_batches=2)
    if machine and norm == "batch":
        with pytest.raises(InputError, match="2 processes are to train: each would normalise by its own cells only"):
            require_same_norm(Machine(accelerator="cpu", **machine), network)
    else:
        require_same_norm(Machine(accelerator="cpu", **machine), network)


@pytest.mark.slow
def test_half_precision_is_near_that_of_one_process(store, tmp_path):
    make(told(store, tmp_path / "one", HALF["bf16"]))
    machines = {f"{strategy}-{precision}": ({"strategy": strategy}, precision) for strategy in STRATEGIES for precision in HALF}
    start_two([told(store, tmp_path / name, HALF[half], machine=machine) for name, (machine, half) in machines.items()], tmp_path)
    for strategy in STRATEGIES:
        assert_same_losses(tmp_path / f"{strategy}-bf16", tmp_path / "one", rtol=0.05)
        fp16 = losses(tmp_path / f"{strategy}-fp16")["train/gepc"]  # its first steps are skipped until the scale of the loss fits
        assert np.isfinite(fp16).all()
        assert fp16.iloc[-1] < 0.9 * fp16.iloc[0]


def test_torchrun_and_slurm_say_how_many_processes_there_are(monkeypatch, tiny_model):
    for name, value in {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}.items():
        monkeypatch.setenv(name, value)
    said = placement(Machine(accelerator="cpu"), "32", tiny_model)
    assert (said["devices"], said["num_nodes"]) == (4, 2)
    assert [plugin.auto_requeue for plugin in said["plugins"] if hasattr(plugin, "auto_requeue")] == [False]
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    said = placement(Machine(accelerator="cpu"), "32", tiny_model)
    assert (said["devices"], said["num_nodes"]) == (2, 3)
    with pytest.raises(InputError, match="torchrun started 2 processes on 3 nodes"):
        placement(Machine(accelerator="cpu", devices=4), "32", tiny_model)


def test_slurm_without_tasks_per_node_is_refused(monkeypatch, tiny_model):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_NNODES", "2")
    with pytest.raises(InputError, match="--ntasks-per-node=4"):
        placement(Machine(accelerator="cpu"), "32", tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["own", "torchrun"])
def test_the_command_runs_on_two_processes_and_overwrites(store, tmp_path, launcher):
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(epochs=0.5)))
    words = ["pretrain", str(store), "--out", str(tmp_path / "run"), "--recipe", str(tmp_path / "recipe.yaml"), "--accelerator", "cpu"]
    alone = [sys.executable, "-m", "annformer", *words, "--devices", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "annformer", *words]
    command = alone if launcher == "own" else torchrun
    for more in ([], ["--overwrite"]):
        done = subprocess.run([*command, *more], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("held-out squared error") == 1
        assert done.stderr.count("INFO pretraining") == 1
        assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    again = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    assert again.returncode != 0
    assert again.stderr.count("is finished") == 1
