from __future__ import annotations

import time

import pytest

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


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (None, tmp_path / "not there"):
        with timed(folder) as seconds:
            assert seconds() >= 0
    assert not list(tmp_path.iterdir())
