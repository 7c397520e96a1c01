from __future__ import annotations

import sys

import pandas as pd
import pytest

from annformer.errors import InputError
from annformer.train import log
from annformer.train.log import CSVLog, loggers, read_log, require_loggers


def test_columns_may_come_later_and_rows_of_a_step_are_one_in_the_end(tmp_path):
    table = CSVLog(tmp_path)
    table.log_metrics({"validation/loss": 3.5}, 0)
    table.log_metrics({"train/loss": 3.0, "epoch": 0.5}, 5)
    table.log_metrics({"validation/loss": 2.5}, 5)
    table.log_metrics({"train/loss": 2.0, "epoch": 1.0}, 10)
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert rows == ["step,validation/loss,train/loss,epoch", "0,3.5,,", "5,,3.0,0.5", "5,2.5,,", "10,,2.0,1.0"]
    merged = read_log(tmp_path)
    assert merged["step"].tolist() == [0, 5, 10]
    assert merged.loc[1].tolist() == [5, 2.5, 3.0, 0.5]


def test_rows_are_in_the_file_as_soon_as_they_are_logged(tmp_path):
    table = CSVLog(tmp_path)
    for step in range(3):
        table.log_metrics({"a": 1.0}, step)
        assert len(pd.read_csv(tmp_path / "log.csv")) == step + 1


@pytest.mark.parametrize("tail", ["", "15,9", "15,9,9\n20,", "15,9,9,9,9\n", "not a step,1,2\n", "\0\0\0\n", "\n\n"])
def test_going_on_takes_out_what_is_cut_off_and_what_came_after_the_checkpoint(tmp_path, tail):
    (tmp_path / "log.csv").write_text("step,a,b\n5,1,2\n10,3,4\n" + ("15,5,6\n" if not tail.startswith("15") else "") + tail)
    CSVLog(tmp_path, start=10).log_metrics({"a": 7}, 15)
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,a,b", "5,1,2", "10,3,4", "15,7,"]


def test_a_run_that_begins_anew_has_a_new_table(tmp_path):
    (tmp_path / "log.csv").write_text("step,a\n5,1\n")
    CSVLog(tmp_path).log_metrics({"b": 7}, 0)
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,b", "0,7"]


def test_going_on_without_a_table(tmp_path):
    CSVLog(tmp_path, start=10).log_metrics({"a": 7}, 11)
    assert read_log(tmp_path)["a"].tolist() == [7]


def test_a_table_that_cannot_be_written_is_one_message(tmp_path):
    table = CSVLog(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"log\.csv cannot be written"):
        table.log_metrics({"a": 1}, 0)


@pytest.mark.parametrize(("name", "remedy"), [("tensorboard", r"pip install 'annformer\[tensorboard\]'"), ("wandb", "pip install wandb")])
def test_a_logger_that_is_not_installed_is_named_with_its_remedy(name, remedy, monkeypatch):
    monkeypatch.setattr(log, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=remedy):
        require_loggers(["csv", name])


def test_tensorboard_holds_every_step_once_after_going_on(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps in ((0, (5, 10, 15)), (10, (15, 20))):
        table, board = loggers(["csv", "tensorboard"], tmp_path, start)
        for step in steps:
            for logger in (table, board):
                logger.log_metrics({"train/loss": float(step + start)}, step)
        board.finalize("success")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(5, 5), (10, 10), (15, 25), (20, 30)]
    assert read_log(tmp_path)["step"].tolist() == [5, 10, 15, 20]


def test_wandb_knows_a_run_by_an_id_of_its_own(tmp_path):
    first, again, other = (log._wandb_id(tmp_path / name / "wandb" / "run-id") for name in ("a", "a", "b"))
    assert first == again != other
    assert first.isalnum()
    assert "wandb" not in sys.modules
