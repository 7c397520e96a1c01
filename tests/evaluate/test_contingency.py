from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from annformer.evaluate.contingency import adjusted_rand_index, contingency_table, normalised_mutual_information

CODES = st.integers(2, 40).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n)] * 2))


def table(first, second, weight=None):
    weight = np.ones(len(first)) if weight is None else weight
    return contingency_table(np.asarray(first), np.asarray(second), weight, (5, 5))


@given(CODES)
def test_agreement_is_that_of_scikit_learn(codes):
    counted = table(*codes)
    assert normalised_mutual_information(counted) == pytest.approx(normalized_mutual_info_score(*codes), abs=1e-12)
    assert adjusted_rand_index(counted) == pytest.approx(adjusted_rand_score(*codes), abs=1e-12)


@given(CODES, st.integers(0, 100))
def test_a_weight_counts_a_cell_several_times(codes, seed):
    weight = np.random.default_rng(seed).integers(0, 4, size=len(codes[0]))
    first, second = (np.repeat(each, weight) for each in codes)
    assert np.array_equal(table(*codes, weight), table(first, second))
