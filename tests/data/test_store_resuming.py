"""A store that is stopped or killed while it is written ends with the same bytes, and none is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from annformer.data import store_writer as writer
from annformer.data.store_writer import write_store
from annformer.errors import InputError
from store_cells import hashes


class TestResume:
    @pytest.mark.parametrize("stop_at", [1, 3, 8])
    def test_stopped_run_ends_with_the_same_bytes(self, files, tmp_path, monkeypatch, stop_at):
        options = {"memory_gb": 2e-5, "shard_bytes": 20_000, "exclude": files[2:]}
        monkeypatch.setattr(writer, "CELLS_PER_READ", 16)
        write_store(files[:2], tmp_path / "whole", **options)
        calls = 0

        def stop(phase: str, done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            if calls == stop_at or (phase == "writing" and calls > 11 - stop_at):
                msg = "stopped"
                raise RuntimeError(msg)

        with pytest.raises(RuntimeError, match="stopped"):
            write_store(files[:2], tmp_path / "store", progress=stop, **options)
        assert not (tmp_path / "store").exists()
        write_store(files[:2], tmp_path / "store", resume=True, **options)
        assert not (tmp_path / "store.partial").exists()
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (tmp_path / "store" / path.name).read_bytes(), path.name

    def test_killed_run_goes_on(self, files, tmp_path):
        """Kill the process in the middle of an append: what came after the journal does not count."""

        script = f"""
import os, signal
from annformer.data import store_writer as writer
from annformer.data.find_studies import find_studies, study_names
writer.CELLS_PER_READ = 16
calls = 0
def progress(phase, done, total):
    global calls
    calls += 1
    if calls == 7:
        for path in writer.Path({str(tmp_path)!r}).glob("store.partial/buckets/bucket*"):
            path.open("ab").write(b"half a cell")
        os.kill(os.getpid(), signal.SIGKILL)
writer.write_store({[str(f) for f in files]!r}, {str(tmp_path / "store")!r}, memory_gb=2e-5, progress=progress)
"""
        killed = subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=False, capture_output=True, env=dict(os.environ))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        write_store(files, tmp_path / "store", memory_gb=2e-5, resume=True)
        write_store(files, tmp_path / "whole", memory_gb=2e-5)
        assert hashes(tmp_path / "store") == hashes(tmp_path / "whole")

    def test_other_job_is_refused(self, files, tmp_path):
        self._stop(files, tmp_path)
        with pytest.raises(InputError, match="other seed"):
            write_store(files, tmp_path / "store", memory_gb=2e-5, seed=3, resume=True)
        with pytest.raises(InputError, match="other studies"):
            write_store(files[:2], tmp_path / "store", memory_gb=2e-5, resume=True)
        assert (tmp_path / "store.partial").exists()

    def test_finished_shard_that_is_gone_is_noticed(self, files, tmp_path):
        options = {"memory_gb": 2e-5, "shard_bytes": 20_000}
        seen = []

        def stop(phase: str, *_: object) -> None:
            seen.append(phase)
            if seen.count("writing") == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_store(files, tmp_path / "store", progress=stop, **options)
        next((tmp_path / "store.partial" / "store").glob("shard*")).unlink()
        with pytest.raises(InputError, match="is missing or has another size"):
            write_store(files, tmp_path / "store", resume=True, **options)
        assert write_store(files, tmp_path / "store", **options).n_cells == 160

    def test_without_resume_it_begins_anew(self, files, tmp_path, caplog):
        self._stop(files, tmp_path)
        assert write_store(files, tmp_path / "store").n_cells == 160
        assert "discarding the unfinished work" in caplog.text

    def _stop(self, files: list[Path], tmp_path: Path) -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_store(files, tmp_path / "store", memory_gb=2e-5, progress=lambda phase, *_: stop() if phase == "writing" else None)

    def test_finished_store_is_kept_until_the_new_one_is_whole(self, files, tmp_path):
        write_store(files, tmp_path / "store")
        with pytest.raises(InputError, match="exists already"):
            write_store(files, tmp_path / "store")
        before = hashes(tmp_path / "store")
        with pytest.raises(RuntimeError):
            write_store(files, tmp_path / "store", overwrite=True, seed=1, progress=_fail)
        assert hashes(tmp_path / "store") == before
        write_store(files, tmp_path / "store", overwrite=True, seed=1)
        assert hashes(tmp_path / "store") != before


def _fail(*_: object) -> None:
    msg = "no"
    raise RuntimeError(msg)
