"""A run that is killed, stopped or out of room goes on to the very weights of one that never was."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from annformer.train.log import read_log
from killed_runs import Run, steps_logged

N_STEPS = 18
RECIPE = f"""
model: {{width: 16, n_heads: 2, n_layers: 1, ff_width: 16, dropout: 0.2, profile: true}}
min_cells: 1
train: {{epochs: {N_STEPS / 3}, tokens_per_step: 2500, tokens_per_forward: 1300, hold_out: {{share: 0.1}}, learning_rate: 0.01,
        checkpoint_steps: 2, log_steps: 1, validations: 3}}
"""


@pytest.fixture(scope="module")
def words(tiny_store, tmp_path_factory) -> tuple[str, ...]:
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(RECIPE)
    return (str(tiny_store), "--recipe", str(recipe), "--name", "test")


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run = Run(words, out)
    assert run.end() == 0, run.said()
    assert steps_logged(out) == N_STEPS
    return out


def go_on(words, out: Path, *more: str) -> None:
    run = Run((*words, *more), out)
    assert run.end() == 0, run.said()


def losses(out: Path) -> pd.DataFrame:
    history = read_log(out)
    return history[sorted(name for name in history.columns if "per_second" not in name and name != "mfu")]


def assert_same(out: Path, whole: Path, *, config: bool = True) -> None:
    for name in ("model.safetensors", *(["config.json"] if config else [])):
        assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes(), f"{name} differs"
    pd.testing.assert_frame_equal(losses(out), losses(whole), check_exact=True)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())


def kill_somewhere(run: Run, rng: random.Random, first: int = 0) -> None:
    """SIGKILL, at a random time after a random step."""
    run.wait_for_step(rng.randint(first, N_STEPS - 2))
    time.sleep(rng.random() * 0.05)
    run.kill(signal.SIGKILL)
    assert run.end() == -signal.SIGKILL, run.said()


def test_killed_at_a_random_moment(words, whole, tmp_path):
    kill_somewhere(Run(words, tmp_path / "run"), random.Random(1))
    go_on(words, tmp_path / "run")
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("fault", "left"),
    [(("killed while writing a checkpoint", 3), [2, 4]), (("killed before old checkpoints are removed", 3), [2, 4, 6])],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_killed_during_a_checkpoint(words, whole, tmp_path, fault, left):
    assert Run(words, tmp_path / "run", fault).end() == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step*")) == [f"step-{step:09d}.ckpt" for step in left]
    go_on(words, tmp_path / "run")
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_command_killed_five_times_by_the_clock(words, tmp_path, seed):
    """While it starts, reads, trains, writes, draws: whatever it does then."""
    rng, out, environment = random.Random(seed), tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1"}

    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "annformer", "pretrain", *words, "--out", str(folder)], env=environment)

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    seconds, killed = time.monotonic() - began, 0
    while killed < 5:
        process = start(out)
        try:
            assert process.wait(rng.uniform(0.4, 0.95) * seconds) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
            process.wait()
        if (out / "model").exists():  # it was faster than the clock
            assert_same(out, tmp_path / "whole")
            shutil.rmtree(out)
    assert start(out).wait() == 0
    assert_same(out, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_other_random_moments(words, whole, tmp_path, seed):
    rng = random.Random(100 + seed)
    for _ in range(1 + seed % 2):
        kill_somewhere(Run(words, tmp_path / "run"), rng, first=max(0, steps_logged(tmp_path / "run")))
    go_on(words, tmp_path / "run")
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 4])
@pytest.mark.parametrize("where", ["while writing a checkpoint", "before a checkpoint is flushed", "before a checkpoint gets its name"])
def test_killed_during_any_checkpoint(words, whole, tmp_path, where, nth):
    assert Run(words, tmp_path / "run", (f"killed {where}", nth)).end() == -signal.SIGKILL
    go_on(words, tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_another_number_of_loading_processes(words, whole, tmp_path):
    kill_somewhere(Run(words, tmp_path / "run"), random.Random(2))
    go_on(words, tmp_path / "run", "--set", "train.workers=2")
    assert_same(tmp_path / "run", whole, config=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_saves_and_stops(words, whole, tmp_path, number):
    """Sent to the loading processes too, as a terminal and a cluster do."""
    out = tmp_path / "run"
    run = Run((*words, "--set", "train.workers=1", "train.checkpoint_steps=1000"), out)
    run.wait_for_step(5)
    os.killpg(run.process.pid, number)
    assert run.end() == 2, run.said()
    assert number.name in run.said()
    assert "stopped after step" in run.said(), run.said()
    (saved,) = (out / "checkpoints").iterdir()
    step = int(saved.stem.removeprefix("step-"))
    assert f"stopped after step {step} of {N_STEPS}, which is saved" in run.said()
    assert "Traceback" not in run.said()
    assert step == steps_logged(out)
    go_on(words, out)
    assert_same(out, whole)


def test_a_second_signal_stops_at_once(words, tmp_path):
    run = Run(words, tmp_path / "run", ("slow step", 5))
    run.wait_for_step(4)
    for _ in range(2):
        run.kill(signal.SIGTERM)
        time.sleep(0.3)
    assert run.end() == 2, run.said()
    assert "stopped at once" in run.said()
    assert steps_logged(tmp_path / "run") == 4


@pytest.mark.parametrize("fault", [("no room for a checkpoint", 2), ("no room for the log", 2)], ids=lambda fault: fault[0])
def test_full_disk(words, whole, tmp_path, fault):
    out = tmp_path / "run"
    run = Run(words, out, fault)
    assert run.end() == 2, run.said()
    assert "the disk is full" in run.said()
    assert "Traceback" not in run.said()
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000000002.ckpt", "step-000000004.ckpt"]
    go_on(words, out)
    assert_same(out, whole)


def test_a_truncated_checkpoint_is_said_and_the_one_before_it_taken(words, whole, tmp_path):
    out = tmp_path / "run"
    assert Run(words, out, ("killed before a checkpoint gets its name", 4)).end() == -signal.SIGKILL
    newest = out / "checkpoints" / "step-000000006.ckpt"
    os.truncate(newest, newest.stat().st_size // 2)
    run = Run(words, out)
    assert run.end() == 0
    assert f"the checkpoint {newest} cannot be read" in run.said()
    assert "going on after step 4" in run.said()
    assert_same(out, whole)


def test_a_damaged_shard_is_named_before_anything_is_written(words, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(words[0], store)
    shard = sorted(store.glob("*.arrow"))[-1]
    content = bytearray(shard.read_bytes())
    content[-200] ^= 1
    shard.write_bytes(content)
    run = Run((str(store), *words[1:]), tmp_path / "run")
    assert run.end() == 2, run.said()
    assert shard.name in run.said()
    assert "is damaged" in run.said()
    assert not (tmp_path / "run").exists()
