from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import example, given
from hypothesis import strategies as st

from annformer.data.collapse import Collapsed, Rows, collapse, content_hashes


def dense(cells: Collapsed, n_slots: int) -> np.ndarray:
    return sp.csr_array((cells.data, cells.indices, cells.indptr), shape=(len(cells.indptr) - 1, n_slots)).toarray()


@given(seed=st.integers(0, 10_000), n_rows=st.integers(1, 7), n_columns=st.integers(1, 9), n_slots=st.integers(1, 6))
def test_equals_a_dense_sum(seed: int, n_rows: int, n_columns: int, n_slots: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 2 * n_columns, size=n_rows)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    indices = rng.integers(n_columns, size=indptr[-1])  # unsorted, with columns that stand twice in a row
    data = rng.integers(0, 4, size=indptr[-1]).astype(rng.choice(["f4", "f8", "i4", "u1", "i8"]))
    slots = rng.integers(-1, n_slots, size=n_columns).astype(np.int32)
    cells = collapse(Rows(indptr, indices, data), slots, n_slots)
    wanted = np.zeros((n_rows, n_slots))
    for row in range(n_rows):
        for k in range(indptr[row], indptr[row + 1]):
            if slots[indices[k]] >= 0:
                wanted[row, slots[indices[k]]] += data[k]
    np.testing.assert_array_equal(dense(cells, n_slots), wanted)
    assert (cells.data != 0).all()
    for row in range(n_rows):
        assert (np.diff(cells.indices[cells.indptr[row] : cells.indptr[row + 1]]) > 0).all()


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([1, 2**24], "i8"), np.float32),
        (np.array([1, 2**24 + 1], "i8"), np.float64),
        (np.array([0.5, 3.0]), np.float32),
        (np.array([0.1, 3.0]), np.float64),
        (np.array([0.1, 3.0], "f4"), np.float32),
        (np.array([True, True]), np.float32),
        (np.array([1e300, 1.0]), np.float64),
    ],
)
def test_values_are_float32_where_that_is_exact(values: np.ndarray, dtype: type) -> None:
    cells = collapse(Rows(np.array([0, 2]), np.array([1, 0]), values), np.arange(2, dtype=np.int32), 2)
    assert cells.data.dtype == dtype
    np.testing.assert_array_equal(cells.data, values[::-1].astype(np.float64))


def test_sums_of_float32_are_exact() -> None:
    slots = np.zeros(2, dtype=np.int32)
    rows = Rows(np.array([0, 2]), np.array([0, 1]), np.array([2.0**24, 1.0], "f4"))
    assert collapse(rows, slots, 1).data.tolist() == [2.0**24 + 1]
    rows = Rows(np.array([0, 3]), np.array([0, 1, 1]), np.array([2.0**24, 1.0, 1.0], "f4"))
    assert collapse(rows, slots, 1).data.tolist() == [2.0**24 + 2]  # float32 would have lost both


@given(
    cells=st.lists(st.lists(st.floats(0, 1e6, exclude_min=True), min_size=5, max_size=5), min_size=1, max_size=4),
    order=st.permutations(range(5)),
    logarithms=st.booleans(),
    dtype=st.sampled_from(["f4", "f8"]),
)
@example(cells=[[0.1, 0.2, 0.3, 1.0, 1.0]], order=[2, 1, 0, 3, 4], logarithms=False, dtype="f8")
def test_sums_of_fractions_do_not_depend_on_the_order_of_columns(
    cells: list[list[float]], order: list[int], logarithms: bool, dtype: str
) -> None:
    data = (np.log1p(cells) if logarithms else np.array(cells)).astype(dtype)
    slots = np.array([0, 0, 0, 1, 1], dtype=np.int32)
    indptr, indices = np.arange(len(cells) + 1) * 5, np.tile(np.arange(5), len(cells))
    one = collapse(Rows(indptr, indices, data.ravel()), slots, 2, logarithms=logarithms)
    other = collapse(Rows(indptr, indices, data[:, order].ravel()), slots[order], 2, logarithms=logarithms)
    np.testing.assert_array_equal(dense(one, 2), dense(other, 2))
    assert one.data.dtype == other.data.dtype
    np.testing.assert_array_equal(content_hashes(one), content_hashes(other))


def test_of_logarithms_the_counts_behind_them_are_added() -> None:
    counts = np.array([[3.0, 4.0, 2.0], [0.0, 5.0, 0.0]])
    rows = sp.csr_array(np.log1p(counts))
    slots = np.array([0, 0, 1], dtype=np.int32)
    both = [
        collapse(Rows(rows.indptr, rows.indices, rows.data.astype(dtype)), slots, 2, logarithms=True) for dtype in (np.float32, np.float64)
    ]
    for cells in both:
        np.testing.assert_allclose(dense(cells, 2), np.log1p([[7, 2], [5, 0]]), rtol=1e-6)
    assert both[0].data.dtype == np.float32
    assert both[1].data[-1] == np.log1p(5.0)  # a value that stands alone is left as it is


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_finds_the_first_bad_value_even_in_a_column_that_is_left_out(bad: float) -> None:
    rows = Rows(np.array([0, 2, 4]), np.array([0, 1, 0, 1]), np.array([1.0, 2.0, 3.0, bad]))
    assert collapse(rows, np.array([0, -1], dtype=np.int32), 1).first_bad == 3


def test_column_numbers_outside_of_the_matrix_are_refused() -> None:
    for column in (2, -1):
        with pytest.raises(IndexError, match="outside"):
            collapse(Rows(np.array([0, 1]), np.array([column]), np.ones(1)), np.arange(2, dtype=np.int32), 2)


def test_content_hash_depends_on_genes_and_values_only() -> None:
    rows = Rows(np.array([0, 2, 4, 6, 8]), np.array([0, 1, 1, 0, 0, 1, 0, 2]), np.array([1.0, 2, 2, 1, 2, 1, 1, 2]))
    first, same, swapped, other_gene = content_hashes(collapse(rows, np.arange(3, dtype=np.int32), 3))
    assert first == same
    assert len({first, swapped, other_gene}) == 3
