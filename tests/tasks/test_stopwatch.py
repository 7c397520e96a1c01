from __future__ import annotations

import time

import pytest

from annformer.errors import InputError, input_error
from annformer.tasks._stopwatch import SECONDS, timed


def test_seconds_of_earlier_starts_are_added_up(tmp_path):
    with pytest.raises(KeyboardInterrupt), timed(tmp_path):
        time.sleep(0.1)
        raise KeyboardInterrupt
    with timed(tmp_path) as seconds:
        time.sleep(0.1)
        assert seconds() >= 0.2
    with timed(tmp_path) as seconds:
        assert 0.2 <= seconds() < 5
    (tmp_path / SECONDS).write_text("cut o")
    with timed(tmp_path) as seconds:
        assert seconds() < 0.1


def test_a_refused_start_is_none(tmp_path):
    (tmp_path / SECONDS).write_text("100")
    with pytest.raises(InputError), timed(tmp_path):
        found = "this"
        raise input_error(found, "that", "do so")
    assert (tmp_path / SECONDS).read_text() == "100"


def test_a_clock_that_cannot_be_written_loses_no_work(tmp_path):
    (tmp_path / SECONDS).mkdir()
    with timed(tmp_path) as seconds:
        pass
    assert seconds() < 5


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (None, tmp_path / "not there"):
        with timed(folder) as seconds:
            assert seconds() >= 0
    assert not list(tmp_path.iterdir())
