from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from annformer.comparison import methods
from annformer.comparison.calls import BATCH, TYPE, Called, Caller, CallRun, Split, pool, run_folds, shuffled, with_parts
from annformer.data.split import folds
from annotation_callers import NoWatch

N = 30
LABELS = np.array(["B", "T", "NK"] * 10, dtype=object)


@pytest.fixture(autouse=True)
def no_watch(monkeypatch):
    monkeypatch.setattr(methods, "MemoryWatch", NoWatch)


@pytest.fixture
def cells() -> ad.AnnData:
    """Each has its number as its only count."""
    adata = ad.AnnData(np.arange(1.0, N + 1, dtype=np.float32)[:, None], obs=pd.DataFrame(index=[f"c{n}" for n in range(N)]))
    adata.obsm["X_annformer"] = np.arange(2.0 * N).reshape(N, 2)
    adata.uns["annformer"] = {"X_annformer": {"fingerprint": "f"}}
    return adata


def number(given: ad.AnnData) -> np.ndarray:
    return np.asarray(given.X).ravel().astype(int) - 1


def everything(given: ad.AnnData) -> str:
    """All that stands in an AnnData beside its counts."""
    return " ".join(str(part) for part in (given.obs, given.obs.columns, given.var, given.uns, given.layers, given.obsp, given.varm))


def test_no_method_sees_a_type_that_it_is_asked_for(cells):
    seen: list[tuple[set[int], set[int]]] = []

    def spy(reference, query, seed):
        learned, asked = number(reference), number(query)
        seen.append((set(learned), set(asked)))
        assert np.array_equal(reference.obs[TYPE].to_numpy(), LABELS[learned])
        assert list(query.obs) == []
        assert not any(name in everything(query) for name in ("B", "NK"))
        assert query.raw is None
        assert np.array_equal(query.obsm["X_annformer"][:, 0], 2 * asked)
        assert query.uns["annformer"]["X_annformer"]["fingerprint"] == "f"
        return Called(np.full(len(asked), "B", object))

    split = Split("random", folds(LABELS), (0,))
    run_folds([Caller("a", "ours", spy), Caller("b", "floor", spy)], cells, LABELS, [split])
    assert len(seen) == 2 * 5
    for learned, asked in seen:
        assert learned.isdisjoint(asked)
        assert learned | asked == set(range(N))
    assert sorted(n for _, asked in seen[::2] for n in asked) == list(range(N))


def test_batches_are_told_where_they_are_held_out(cells):
    batches = np.array([f"b{n % 3}" for n in range(N)], dtype=object)
    told = []

    def spy(reference, query, seed):
        told.append(sorted(set(reference.obs[BATCH])) if BATCH in reference.obs else None)
        return Called(np.full(query.n_obs, "B", object))

    splits = [Split("by batch", folds(LABELS, batches), (0,), batches), Split("random", folds(LABELS), (0,))]
    run_folds([Caller("a", "ours", spy)], cells, LABELS, splits)
    assert told == [["b1", "b2"], ["b0", "b2"], ["b0", "b1"], *[None] * 5]


def test_no_method_finds_what_another_left(cells):
    def greedy(reference, query, seed):
        assert list(reference.obs) == [TYPE]
        assert reference.obsm["X_annformer"][0, 0] == 2 * number(reference)[0]
        reference.obs["mine"] = 1
        query.obs["mine"] = 1
        reference.obsm["X_annformer"][:] = -1
        return Called(np.full(query.n_obs, "B", object))

    run_folds([Caller("a", "ours", greedy), Caller("b", "ours", greedy)], cells, LABELS, [Split("random", folds(LABELS), (0,))])
    assert cells.obsm["X_annformer"].min() == 0


def test_what_is_said_of_a_cell_comes_back_to_it(cells):
    def tell(reference, query, seed):
        names = query.obs_names.to_numpy(dtype=object)
        sets = pd.DataFrame({"B": np.ones(len(names), bool), f"only {seed}": np.zeros(len(names), bool)})
        return Called(names, number(query) / N, number(query) + 0.5, sets, {"part": names})

    split = Split("random", folds(LABELS), (4, 7))
    runs = run_folds([Caller("a", "ours", tell, random=True), Caller("b", "floor", tell)], cells, LABELS, [split])
    assert [(run.name, run.seed) for run in runs] == [("b", 4), ("a", 4), ("a", 7)]
    for run in runs:
        assert run.called.types.tolist() == cells.obs_names.to_list()
        assert run.called.parts["part"].tolist() == cells.obs_names.to_list()
        assert run.called.confidence == pytest.approx(np.arange(N) / N)
        assert run.called.novelty == pytest.approx(np.arange(N) + 0.5)
        assert run.called.sets["B"].all()
        assert run.seconds >= 0


def test_classes_that_a_fold_lacks_are_in_no_set_of_it():
    one = Called(np.array(["B"], object), sets=pd.DataFrame({"B": [True]}))
    other = Called(np.array(["T"], object), sets=pd.DataFrame({"T": [True]}))
    sets = pool([np.array([1]), np.array([0])], [one, other]).sets
    assert sets.to_dict("list") == {"B": [False, True], "T": [True, False]}


def test_what_not_all_folds_say_is_not_said():
    names = np.array(["B"], object)
    pooled = pool([np.array([0]), np.array([1])], [Called(names, np.ones(1), parts={"p": names}), Called(names)])
    assert (pooled.confidence, pooled.sets, dict(pooled.parts)) == (None, None, {})


def test_parts_and_control_are_runs_that_cost_nothing():
    types = np.array(["B", "B", "T", "T"] * 10, dtype=object)
    run = CallRun("ours", "ours", "random", 3, Called(types, parts={"half": types[::-1]}), 5.0, 9.0)
    whole, part = with_parts([run])
    assert (part.name, part.kind, part.seed) == ("half", "ours", 3)
    assert part.called.types.tolist() == types[::-1].tolist()
    assert np.isnan(part.seconds)
    control = shuffled([whole], "ours", "random", 0)
    assert control.kind == "control"
    assert sorted(control.called.types) == sorted(types)
    assert not np.array_equal(control.called.types, types)


def test_after_the_first_fold_it_is_said_how_long_the_rest_takes(cells, caplog):
    def quick(reference, query, seed):
        return Called(np.full(query.n_obs, "B", object))

    with caplog.at_level("INFO", logger="annformer"):
        run_folds([Caller("a", "ours", quick, random=True)], cells, LABELS, [Split("random", folds(LABELS), (0, 1))])
    said = caplog.messages
    assert said[0].startswith("10 runs of 1 methods")
    assert [line.split(" will")[0] for line in said if line.startswith("the other")] == [f"the other {n} runs" for n in (8, 6, 4, 2)]
    assert said[-1].startswith("[10/10] a, seed 1 took")
