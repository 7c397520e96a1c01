"""What finished runs of a comparison leave on disk, and when it is taken up again."""

from __future__ import annotations

import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from annformer.comparison.calls import Called, Caller, Split, run_folds
from annformer.comparison.kept import Kept, digest
from annformer.comparison.methods import Made, Method, run_all
from annformer.data.split import Fold

HISTORY = pd.DataFrame({"step": [1, 2], "train/loss": [1 / 3, np.nan]})
LABELS = np.array(["a", "b"] * 4, dtype=object)


def cells(n: int = 8, value: float = 1.0) -> ad.AnnData:
    counts = csr_matrix(np.full((n, 3), value, np.float32))
    return ad.AnnData(counts, obs=pd.DataFrame({"batch": ["a"] * n}, index=[str(i) for i in range(n)]))


class Counted:
    """A method that counts its runs, and may be killed at one of them."""

    def __init__(self, killed_at: int = 0) -> None:
        self.n, self.killed_at = 0, killed_at

    def count(self) -> None:
        self.n += 1
        if self.n == self.killed_at:
            raise KeyboardInterrupt

    def embed(self, cells: ad.AnnData, seed: int) -> Made:
        self.count()
        return Made(np.random.default_rng(seed).normal(size=(cells.n_obs, 2)), HISTORY)

    def call(self, reference: ad.AnnData, query: ad.AnnData, seed: int) -> Called:
        self.count()
        types = np.array(list(reference.obs["cell_type"].astype(object)))[: query.n_obs].astype(object)
        draw = np.random.default_rng(seed).random(query.n_obs)
        sets = pd.DataFrame(np.outer(draw, [1, 2]) > 0.5, index=query.obs_names, columns=["a", "b"])
        return Called(types, draw, None, sets, {"a part": types[::-1].copy()})


def integrated(counted: Counted, kept: Kept):
    return run_all([Method("ours", "ours", counted.embed), Method("floor", "floor", counted.embed)], cells(), (0, 1, 2), kept)


def called(counted: Counted, kept: Kept):
    rows = np.arange(8)
    split = Split("random", [Fold(str(i), rows[rows % 4 != i], rows[rows % 4 == i]) for i in range(4)], (0, 1))
    callers = [Caller("ours", "ours", counted.call, random=True), Caller("floor", "floor", counted.call)]
    return run_folds(callers, cells(), LABELS, [split], kept)


def test_a_stopped_comparison_of_embeddings_goes_on_and_ends_the_same(tmp_path):
    kept = Kept(tmp_path / "work", {"cells": "these"})
    with pytest.raises(KeyboardInterrupt):
        integrated(Counted(killed_at=4), kept)
    rest = Counted()
    found = integrated(rest, kept)
    assert rest.n == 3
    whole = integrated(Counted(), Kept(None, {}))
    assert [(run.method.name, run.seed) for run in found] == [(run.method.name, run.seed) for run in whole]
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_array_equal(one.made.embedding, other.made.embedding)
        pd.testing.assert_frame_equal(one.made.history, other.made.history, check_exact=True)
        assert one.seconds > 0


def test_a_stopped_comparison_of_calls_goes_on_and_ends_the_same(tmp_path):
    kept = Kept(tmp_path / "work", {"cells": "these"})
    with pytest.raises(KeyboardInterrupt):
        called(Counted(killed_at=6), kept)
    rest = Counted()
    found, whole = called(rest, kept), called(Counted(), Kept(None, {}))
    assert rest.n == 12 - 5
    for one, other in zip(found, whole, strict=True):
        assert (one.name, one.seed) == (other.name, other.seed)
        np.testing.assert_array_equal(one.called.types, other.called.types)
        np.testing.assert_array_equal(one.called.confidence, other.called.confidence)
        np.testing.assert_array_equal(one.called.parts["a part"], other.called.parts["a part"])
        pd.testing.assert_frame_equal(one.called.sets, other.called.sets)
        assert one.called.novelty is None


def test_what_depends_on_something_else_is_made_anew(tmp_path):
    for job in ({"cells": "these"}, {"cells": "others"}, {"cells": "others", "options": {"recipe": 1}}):
        counted = Counted()
        integrated(counted, Kept(tmp_path, job))
        assert counted.n == 6
    again = Counted()
    integrated(again, Kept(tmp_path, {"cells": "others"}))
    assert again.n == 0


def test_a_file_that_is_not_whole_is_made_anew(tmp_path):
    kept = Kept(tmp_path, {})
    integrated(Counted(), kept)
    files = sorted(tmp_path.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(b"")
    again = Counted()
    integrated(again, kept)
    assert again.n == 2


def test_seeds_of_numpy_are_seeds(tmp_path):
    counted = Counted()
    run_all([Method("ours", "ours", counted.embed)], cells(), np.arange(2), Kept(tmp_path, {}))
    integrated(counted, Kept(tmp_path, {}))
    assert counted.n == 2 + 4, "ours with seeds 0 and 1 is there"


def test_the_digest_sees_counts_genes_batches_and_types():
    one = cells()
    other_genes, other_batches = cells(), cells()
    other_genes.var_names = ["x", "y", "z"]
    other_batches.obs["batch"] = ["a"] * 7 + ["b"]
    found = [digest(one), digest(cells(value=2)), digest(other_genes), digest(other_batches), digest(one, [LABELS])]
    assert len(set(found)) == 5
    assert digest(cells()) == found[0]


def test_a_run_that_can_go_on_does_so_with_its_seconds(tmp_path):
    kept, folders = Kept(tmp_path / "work", {"cells": "these"}), []

    def make(cells: ad.AnnData, seed: int, *, folder: Path) -> Made:
        folders.append(folder)
        if not folder.exists():
            folder.mkdir(parents=True)
            time.sleep(0.2)
            raise KeyboardInterrupt
        return Made(np.zeros((cells.n_obs, 2)))

    methods = [Method("ours", "ours", make, resumes=True)]
    with pytest.raises(KeyboardInterrupt):
        run_all(methods, cells(), (0,), kept)
    assert folders[0].is_dir()
    (run,) = run_all(methods, cells(), (0,), kept)
    assert folders[1] == folders[0]
    assert run.seconds > 0.2
    assert not folders[0].exists()
    assert len(list((tmp_path / "work").iterdir())) == 1
