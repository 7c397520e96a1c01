from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from annformer.errors import InputError
from annformer.evaluate import (
    CLASSIFICATION_DEFINITIONS,
    classification_scores,
    confusion,
    draws,
    macro_f1_on_draws,
    per_type_scores,
)

TRUTH = np.repeat(["B", "NK", "T", "rare"], [50, 30, 117, 3])


def noisy(share: float, others: tuple[str, ...] = ()) -> np.ndarray:
    rng = np.random.default_rng(0)
    said = rng.choice([*np.unique(TRUTH), *others], len(TRUTH))
    return np.where(rng.random(len(TRUTH)) < share, said, TRUTH)


CASES = {"perfect": TRUTH, "noisy": noisy(0.4), "random": noisy(1.0), "unassigned": noisy(0.5, ("unassigned", "A"))}
CASES["no rare type"] = np.where(TRUTH == "rare", "B", noisy(0.3))


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_scikit_learn_over_the_types_of_the_truth(case):
    said, types = CASES[case], np.unique(TRUTH)
    found = classification_scores(TRUTH, said)
    precision, recall, f1, n = precision_recall_fscore_support(TRUTH, said, labels=types, zero_division=0)
    expected = {
        "accuracy": accuracy_score(TRUTH, said),
        "macro_f1": f1.mean(),
        "macro_precision": precision.mean(),
        "macro_recall": recall.mean(),
    }
    assert found == pytest.approx(expected)
    assert list(found) == list(CLASSIFICATION_DEFINITIONS)
    by_type = pd.DataFrame({"type": types, "n": n, "precision": precision, "recall": recall, "f1": f1})
    pd.testing.assert_frame_equal(per_type_scores(TRUTH, said), by_type, check_dtype=False)


def test_perfect_and_constant_predictions():
    assert set(classification_scores(TRUTH, TRUTH).values()) == {1.0}
    found = classification_scores(TRUTH, ["T"] * len(TRUTH))
    assert found["accuracy"] == pytest.approx(117 / 200)
    assert found["macro_recall"] == pytest.approx(1 / 4)
    assert found["macro_f1"] == pytest.approx(2 * 117 / (117 + 200) / 4)


def test_a_rare_type_weighs_as_much_as_any_other():
    missed = np.where(TRUTH == "rare", "T", TRUTH)
    assert classification_scores(TRUTH, missed)["accuracy"] > 0.98
    assert classification_scores(TRUTH, missed)["macro_f1"] < 0.75


def test_a_type_that_is_not_in_the_truth_costs_recall_only():
    wrong = np.arange(10)
    as_other, as_unknown = TRUTH.copy(), TRUTH.astype(object)
    as_other[wrong], as_unknown[wrong] = "NK", "unassigned"
    found = per_type_scores(TRUTH, as_unknown).set_index("type")
    assert list(found.index) == ["B", "NK", "T", "rare"]
    assert found.precision.min() == 1
    assert found.recall["B"] == pytest.approx(0.8)
    assert classification_scores(TRUTH, as_other)["macro_f1"] < classification_scores(TRUTH, as_unknown)["macro_f1"]


def test_confusion_counts_true_types_in_rows():
    said = CASES["unassigned"]
    found = confusion(pd.Series(TRUTH, index=np.arange(200)[::-1]), said)
    assert list(found.index) == ["B", "NK", "T", "rare"]
    assert list(found.columns) == ["B", "NK", "T", "rare", "A", "unassigned"]
    order = list(found.columns)
    assert np.array_equal(found, confusion_matrix(TRUTH, said, labels=order)[:4])
    assert found.to_numpy().sum() == len(TRUTH)


@pytest.mark.parametrize("case", CASES)
def test_on_draws_macro_f1_is_that_of_the_drawn_cells(case):
    said = CASES[case]
    rng = np.random.default_rng(1)
    rows = [rng.integers(len(TRUTH), size=150) for _ in range(20)] + [np.arange(50)]  # the last has one type
    found = macro_f1_on_draws(TRUTH, said, iter(rows))
    with np.errstate(all="raise"):
        expected = [classification_scores(TRUTH[some], said[some])["macro_f1"] for some in rows]
    assert found == pytest.approx(expected)
    assert min(len(set(TRUTH[some])) for some in rows[:-1]) < 4, "a draw without the rare type is among them"


def test_codes_do_as_well_as_names():
    names = np.array(["B", "NK", "T", "rare"])
    truth, said = (np.searchsorted(names, each) for each in (TRUTH, CASES["noisy"]))
    rows = list(draws(None, TRUTH, 5))
    assert np.array_equal(macro_f1_on_draws(truth, said, rows), macro_f1_on_draws(TRUTH, CASES["noisy"], rows))
    assert classification_scores(truth, said) == classification_scores(TRUTH, CASES["noisy"])


def test_a_thousand_draws_of_thousands_of_cells_take_less_than_two_seconds():
    rng = np.random.default_rng(0)
    truth = rng.integers(12, size=12_000)
    said = np.where(rng.random(12_000) < 0.8, truth, rng.integers(12, size=12_000))
    start = time.process_time()
    found = macro_f1_on_draws(truth, said, draws(None, truth, 1_000))
    assert time.process_time() - start < 2
    assert found.std() == pytest.approx(0.0035, abs=0.001)
    assert found.mean() == pytest.approx(f1_score(truth, said, average="macro"), abs=0.001)


def test_missing_types_are_refused():
    for truth, said in ((["B", None], ["B", "B"]), (["B", "B"], ["B", np.nan]), ([], [])):
        with pytest.raises(InputError, match=r"are missing|no cell"):
            classification_scores(truth, said)
