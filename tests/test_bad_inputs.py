"""Every row of the table of mistakes: status 2, one message of the one form, no traceback, nothing written."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy.sparse import random as sparse_random

from annformer.cli import main
from bad_annotation import ANNOTATIONS, FINE_ANNOTATIONS
from bad_inputs import EMBED, FINE, ROWS, Kit, Row
from bad_mapping import FINE_MAPPINGS, MAPPINGS


def snapshot(folder: Path) -> dict[str, bytes]:
    """Path and content of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def assert_one_message(text: str, words: tuple[str, ...]) -> None:
    assert "Traceback" not in text
    assert text.count("error: ") == 1, text
    message = text[text.index("error: ") :]
    assert "\n  expected: " in message, message
    assert "\n  what to do: " in message, message
    for word in words:
        assert word in message, f"{word!r} is not said:\n{message}"


@pytest.fixture
def kit(tmp_path, monkeypatch, tiny_adata, tiny_model) -> Kit:
    monkeypatch.chdir(tmp_path)
    kit = Kit(tmp_path, tiny_adata)
    tiny_model.save_pretrained(tmp_path / "model")
    kit.cells()
    return kit


@pytest.mark.parametrize("row", ROWS + ANNOTATIONS + MAPPINGS, ids=lambda row: row.name)
def test_mistake(row: Row, kit: Kit, capsys):
    if row.skip_root and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    if row.needs:
        pytest.importorskip(row.needs)
    row.make(kit)
    before = snapshot(kit.folder)
    status = main(shlex.split(row.argv))
    err = capsys.readouterr().err
    assert status == 2, err
    assert_one_message(err, row.words)
    assert snapshot(kit.folder) == before, "something was written"


@pytest.mark.parametrize("row", FINE + FINE_ANNOTATIONS + FINE_MAPPINGS, ids=lambda row: row.name)
def test_odd_but_fine(row: Row, kit: Kit, capsys):
    row.make(kit)
    status = main(shlex.split(row.argv))
    err = capsys.readouterr().err
    assert status == 0, err
    for word in row.words:
        assert word in err, f"{word!r} is not said:\n{err}"


def test_empty_cells_are_nan_and_only_they(kit: Kit):
    next(row for row in FINE if row.name == "empty cells get NaN").make(kit)
    assert main(shlex.split(EMBED)) == 0
    embedding = anndata.read_h5ad(kit.folder / "out.h5ad").obsm["X_annformer"]
    assert np.flatnonzero(np.isnan(embedding).any(axis=1)).tolist() == [3, 7]


def test_our_fault_is_status_1(kit: Kit, capsys, monkeypatch):
    monkeypatch.setattr("annformer.tasks.embedding.embed_file", lambda *_, **__: 1 / 0)
    assert main(shlex.split(EMBED)) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "--debug" in err
    assert "Traceback" not in err
    assert main([*shlex.split(EMBED), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def annformer(argv: str, folder: Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "annformer", *shlex.split(argv)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False, **options)


def test_pickle_does_not_run(kit: Kit):
    next(row for row in ROWS if row.name == "malicious pickle").make(kit)
    before = snapshot(kit.folder)
    done = annformer("convert theirs --out ours", kit.folder)
    assert done.returncode == 2, done.stderr
    assert_one_message(done.stderr, ("best_model.pt",))
    assert snapshot(kit.folder) == before


def test_full_disk(kit: Kit):
    limit = 64 * 1024
    kit.cells(n_obs=2_000)
    assert (kit.folder / "cells.h5ad").stat().st_size > limit
    before = snapshot(kit.folder)
    done = annformer(EMBED, kit.folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2, done.stderr
    assert_one_message(done.stderr, ("disk is full",))
    assert snapshot(kit.folder) == before


def test_ctrl_c(kit: Kit):
    adata = kit.adata()
    counts = sparse_random(60_000, adata.n_vars, density=0.4, format="csr", dtype=np.float32, rng=np.random.default_rng(0))
    counts.data = np.ceil(counts.data * 5)
    anndata.AnnData(counts, var=adata.var).write_h5ad(kit.folder / "cells.h5ad")
    before = set(snapshot(kit.folder))
    command = [sys.executable, "-m", "annformer", *shlex.split(EMBED)]
    # a shell that runs the tests in the background has taken the signal away from all its children
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=kit.folder, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        first = process.stderr.readline()  # it has read the file and is at work
        process.send_signal(signal.SIGINT)
        err = first + process.stderr.read()
    assert process.returncode == 2, err
    assert_one_message(err, ("Ctrl-C",))
    assert set(snapshot(kit.folder)) == before
