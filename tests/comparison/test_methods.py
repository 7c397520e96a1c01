from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from annformer.comparison.methods import Made, MemoryWatch, Method, choose, first_of, log_of, run_all, shuffled, threads_kept


def method(name: str, kind="floor", **options) -> Method:
    return Method(name, kind, lambda cells, seed: Made(np.full((cells.n_obs, 2), seed, dtype=np.float32)), **options)


TABLE = {
    m.name: m for m in (method("annformer zero-shot", "ours"), method("PCA HVG", random=False), method("scVI", missing="pip install x"))
}


def cells(n: int = 4) -> ad.AnnData:
    return ad.AnnData(np.ones((n, 3), np.float32), obs=pd.DataFrame({"batch": ["a"] * n}, index=[str(i) for i in range(n)]))


def test_what_cannot_run_is_skipped_with_the_reason():
    chosen, skipped = choose(TABLE, None)
    assert [m.name for m in chosen] == ["annformer zero-shot", "PCA HVG"]
    assert skipped == {"scVI": "pip install x"}


@pytest.mark.parametrize("spelt", ["annformer zero-shot", "zero-shot", "Zero_Shot", "annformer-zero-shot"])
def test_names_may_be_spelt_as_on_a_command_line(spelt):
    chosen, skipped = choose(TABLE, [spelt, "pca-hvg", "PCA HVG"])
    assert [m.name for m in chosen] == ["annformer zero-shot", "PCA HVG"]
    assert skipped == {}


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["zero-shot", "pca hgv"], "did you mean PCA HVG"),
        (["zero-shot", "scVI"], "pip install x"),
        (["zero-shot"], "no baseline"),
        (["PCA HVG"], "no method of annformer"),
        ([], "no method of annformer"),
    ],
)
def test_what_cannot_be_compared_is_refused(wanted, words):
    with pytest.raises(ValueError, match=words):
        choose(TABLE, wanted)


def test_floors_run_first_and_only_random_methods_with_every_seed():
    runs = run_all(list(TABLE.values())[:2], cells(), (3, 4))
    assert [(run.method.name, run.seed) for run in runs] == [("PCA HVG", 3), ("annformer zero-shot", 3), ("annformer zero-shot", 4)]
    assert [run.made.embedding[0, 0] for run in runs] == [3, 3, 4]
    assert all(value[0, 0] == 3 for value in first_of(runs).values())


def test_how_many_runs_there_are_is_said_before_the_first(caplog):
    def made(given, seed):
        assert "3 runs of 2 methods; by far the slowest: slow one" in caplog.messages
        return Made(np.zeros((given.n_obs, 1)))

    with caplog.at_level("INFO", logger="annformer"):
        run_all([Method("quick", "ours", made), Method("slow one", "floor", made, random=False, slow=True)], cells(), (0, 1))


def test_no_method_finds_what_another_left():
    def greedy(given: ad.AnnData, seed: int) -> Made:
        assert list(given.obsm) == []
        assert list(given.obs) == ["batch"]
        given.obsm["X"] = np.zeros((given.n_obs, 2))
        given.obs["batch"] = "mine"
        return Made(np.zeros((given.n_obs, 2)))

    these = cells()
    run_all([Method("a", "floor", greedy), Method("b", "ours", greedy)], these, (0, 1))
    assert set(these.obs["batch"]) == {"a"}


def test_the_watch_sees_memory_that_is_given_back():
    with MemoryWatch() as watch:
        taken = np.ones(60 * 2**20, dtype=np.uint8)
        taken.sum()
        del taken
    assert 40 < watch.growth_mb < 120


def test_threads_stay_as_they_were():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads_kept():
        torch.set_num_threads(before + 1)
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_the_control_has_the_same_rows_at_other_cells():
    unordered = Method("ours", "ours", lambda cells, _: Made(np.arange(cells.n_obs * 2.0).reshape(-1, 2)))
    runs = run_all([unordered], cells(50), (0,))
    control = shuffled(runs, "ours", seed=1)
    assert control.method.kind == "control"
    assert not np.array_equal(control.made.embedding, runs[0].made.embedding)
    assert np.array_equal(np.sort(control.made.embedding, axis=0), runs[0].made.embedding)


def test_losses_are_kept_by_method_and_seed():
    trained = Method(
        "t", "ours", lambda cells, seed: Made(np.zeros((cells.n_obs, 1)), pd.DataFrame({"step": [0, 1], "train/gep": [2.0, seed]}))
    )
    history = log_of(run_all([trained, TABLE["PCA HVG"]], cells(), (5, 6)))
    assert history[["method", "seed", "step", "train/gep"]].to_numpy().tolist()[1::2] == [["t", 5, 1, 5.0], ["t", 6, 1, 6.0]]
    assert len(log_of(run_all([TABLE["PCA HVG"]], cells(), (0,)))) == 0
