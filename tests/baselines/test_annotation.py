from __future__ import annotations

import logging

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.metrics import f1_score

from annformer.baselines import ANNOTATION, Called, annotation, available

N_GENES = 320
GENES = np.array([f"G{i}" for i in range(N_GENES)])
OURS = [name for name in ANNOTATION if not name.startswith(("CellTypist", "majority"))]
TYPES = np.array(["B", "NK", "T"])


def cells(n: int, seed: int, fold: float = 4.0) -> tuple[sp.csr_matrix, np.ndarray]:
    """Three types, each with 20 genes of its own that are expressed more; one gene that no cell has."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(3, n, p=[0.6, 0.25, 0.15])
    mean = np.tile(np.random.default_rng(99).gamma(1.0, 1.0, size=N_GENES), (n, 1))
    for code in range(3):
        mean[np.ix_(codes == code, np.arange(20 * code, 20 * code + 20))] *= fold
    mean[:, -1] = 0
    return sp.csr_matrix(rng.poisson(mean).astype(np.float32)), TYPES[codes]


REFERENCE, LABELS = cells(150, 0)
QUERY, TRUTH = cells(80, 1)


@pytest.fixture(autouse=True)
def few_genes(monkeypatch):
    monkeypatch.setattr(annotation, "N_GENES", 100)


def call(name: str, labels: np.ndarray = LABELS, query: sp.csr_matrix = QUERY, seed: int = 0) -> Called:
    return ANNOTATION[name](REFERENCE, labels, query, GENES, seed=seed)


def macro_f1(found: Called) -> float:
    return float(f1_score(TRUTH, found.types.astype(str), average="macro"))


@pytest.mark.parametrize("name", OURS)
def test_planted_types_are_found(name):
    found = call(name)
    assert found.classes == ("B", "NK", "T")
    assert found.probabilities.shape == (80, 3)
    assert found.probabilities.sum(axis=1) == pytest.approx(np.ones(80))
    assert macro_f1(found) > (0.8 if "kNN" in name else 0.95)
    assert np.array_equal(call(name).probabilities, found.probabilities)


@pytest.mark.parametrize("name", OURS)
def test_shuffled_labels_give_chance(name):
    found = call(name, labels=np.random.default_rng(0).permutation(LABELS))
    assert macro_f1(found) < 0.5


@pytest.mark.parametrize("name", ["logistic regression HVG", "logistic regression all genes scaled", "kNN PCA"])
def test_what_a_cell_is_called_does_not_depend_on_the_other_cells_of_the_query(name):
    every, some = call(name), call(name, query=QUERY[:5])
    assert some.probabilities == pytest.approx(every.probabilities[:5], abs=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_a_type_of_one_cell_does_no_harm(name):
    labels = LABELS.astype(object)
    labels[np.flatnonzero(LABELS == "B")[0]] = "alone"
    found = call(name, labels=labels)
    assert found.classes == ("B", "NK", "T", "alone")
    assert macro_f1(found) > 0.7


def test_balanced_weights_find_more_of_a_rare_type():
    reference, labels = cells(300, 2, fold=1.5)
    query, truth = cells(300, 3, fold=1.5)
    plain = ANNOTATION["logistic regression all genes"](reference, labels, query, GENES, seed=0)
    balanced = ANNOTATION["logistic regression balanced"](reference, labels, query, GENES, seed=0)
    rare = truth == "T"
    assert balanced.probabilities[:, 2].mean() > plain.probabilities[:, 2].mean()
    assert (balanced.types[rare] == "T").mean() >= (plain.types[rare] == "T").mean()


def test_the_scale_is_that_of_the_reference():
    known, asked = annotation._dense(REFERENCE, QUERY, scale=True)
    met = REFERENCE.toarray().any(axis=0)
    assert not met.all(), "one gene at least is in no cell of the reference"
    assert known.shape[1] == asked.shape[1] == met.sum()
    dense = REFERENCE.toarray()[:, met]
    expected = np.clip((QUERY.toarray()[:, met] - dense.mean(axis=0)) / dense.std(axis=0, ddof=1), -10, 10)
    assert np.allclose(asked, expected, atol=1e-4)
    assert known.max() == pytest.approx(10)


def test_the_majority_class_is_called_for_every_cell():
    found = call("majority class")
    assert set(found.types) == {"B"}
    assert found.probabilities[0] == pytest.approx([(name == LABELS).mean() for name in TYPES])


@pytest.mark.parametrize("name", list(ANNOTATION))
def test_a_reference_of_one_type_calls_it(name):
    if available(name):
        pytest.skip("not installed")
    found = call(name, labels=np.full(150, "B"))
    assert found.classes == ("B",)
    assert np.array_equal(found.probabilities, np.ones((80, 1)))


@pytest.mark.parametrize("name", ["CellTypist", "CellTypist feature selection"])
def test_celltypist_finds_the_types_and_leaves_logging_alone(name, capsys, monkeypatch):
    pytest.importorskip("celltypist")
    monkeypatch.setattr(annotation, "SELECTED_GENES", 300)
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    found = call(name)
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)
    assert found.classes == ("B", "NK", "T")
    assert ((found.probabilities >= 0) & (found.probabilities <= 1)).all()
    assert macro_f1(found) > 0.9
    assert capsys.readouterr() == ("", "")


def test_what_is_not_installed_is_named(monkeypatch):
    from annformer.baselines import _packages
    from annformer.errors import InputError

    monkeypatch.setattr(_packages, "find_spec", lambda _: None)
    assert available("logistic regression HVG") is None
    assert available("CellTypist feature selection") == "pip install 'annformer[baselines]'"
    with pytest.raises(InputError, match="pip install"):
        call("CellTypist")
