from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annformer.errors import InputError
from annformer.train.batches import BatchPlan, deal, group_weights

LENGTHS = st.lists(st.integers(1, 1200), min_size=1, max_size=300).map(np.array)


def plan(lengths, tokens_per_step=2000, epochs=3.0, seed=0, weights=None):
    rows = 10 * np.arange(len(lengths)) + 7
    return BatchPlan(rows, lengths, tokens_per_step=tokens_per_step, epochs=epochs, seed=seed, weights=weights)


def epoch_rows(made: BatchPlan, epoch: int) -> np.ndarray:
    first = epoch * made.steps_per_epoch
    return np.concatenate([made.rows_of(step) for step in range(first, first + made.steps_per_epoch)])


@given(LENGTHS, st.integers(1200, 6000), st.integers(0, 5))
def test_every_row_stands_once_in_every_epoch(lengths, tokens_per_step, seed):
    made = plan(lengths, tokens_per_step, seed=seed)
    for epoch in range(3):
        assert sorted(epoch_rows(made, epoch)) == sorted(made.rows)
    assert made.n_steps == 3 * made.steps_per_epoch


@given(LENGTHS, st.integers(1200, 6000))
def test_steps_are_never_empty_and_nearly_equal(lengths, tokens_per_step):
    made = plan(lengths, tokens_per_step)
    share = lengths.sum() / made.steps_per_epoch
    assert share <= tokens_per_step
    for step in range(made.n_steps):
        of_step = made.lengths_of(step)
        assert len(of_step) > 0
        if tokens_per_step >= 2 * lengths.max():  # else a step without a cell of its own may have borrowed one
            assert abs(of_step.sum() - share) <= lengths.max() + 1
        assert made.rows_of(step).tolist() == made.rows[np.searchsorted(made.rows, made.rows_of(step))].tolist()


@given(LENGTHS, st.integers(1200, 6000), st.booleans())
def test_sums_are_those_of_the_steps_before(lengths, tokens_per_step, weighted):
    weights = group_weights(np.arange(len(lengths)) % 3, "abc", 1.0, {}) if weighted else None
    made = plan(lengths, tokens_per_step, weights=weights)
    n_cells = n_tokens = 0
    for step in range(made.n_steps):
        assert (made.cells_until(step), made.tokens_until(step)) == (n_cells, n_tokens)
        n_cells += len(made.rows_of(step))
        n_tokens += made.lengths_of(step).sum()
    assert (made.cells_until(made.n_steps), made.tokens_until(made.n_steps)) == (n_cells, n_tokens)


@given(LENGTHS, st.data())
def test_a_step_does_not_depend_on_what_was_asked_before(lengths, data):
    made, step = plan(lengths), data.draw(st.integers(0, plan(lengths).n_steps - 1))
    for other in range(made.n_steps):
        made.rows_of(other)
    assert made.rows_of(step).tolist() == plan(lengths).rows_of(step).tolist()


def test_epochs_and_seeds_differ_and_epochs_may_be_fractions():
    lengths = np.full(100, 50)
    made = plan(lengths, epochs=2.5)
    assert (made.steps_per_epoch, made.n_steps, made.epoch_of(3)) == (3, 8, 1.0)
    assert epoch_rows(made, 0).tolist() != epoch_rows(made, 1).tolist()
    assert epoch_rows(made, 0).tolist() != epoch_rows(plan(lengths, seed=1), 0).tolist()
    assert plan(lengths, epochs=0.01).n_steps == 1
    with pytest.raises(AssertionError):
        made.rows_of(8)


def test_all_orders_are_equally_likely():
    places = np.array([epoch_rows(plan(np.full(4, 50), epochs=6000), epoch) for epoch in range(6000)])
    counted = np.unique(places, axis=0, return_counts=True)[1]
    assert len(counted) == 24
    assert abs(counted - 250).max() < 5 * 250**0.5


@given(
    st.lists(st.tuples(st.integers(1, 1200), st.floats(0, 5)), min_size=1, max_size=200).filter(lambda cells: sum(w for _, w in cells) > 1)
)
def test_weights_are_how_often_cells_are_seen(cells):
    lengths, weights = (np.array(values) for values in zip(*cells, strict=True))
    weights /= weights.mean()
    made = plan(lengths, weights=weights)
    assert made.cells_per_epoch == len(lengths)
    for epoch in range(3):
        seen = np.bincount(epoch_rows(made, epoch) // 10, minlength=len(lengths))
        assert seen.sum() == len(lengths)
        assert (np.abs(seen - weights) < 1 + 1e-9).all()
        assert not seen[weights == 0].any()


def test_weights_hold_on_average():
    weights = np.array([0.2, 0.5, 1.3, 2.0])
    made = plan(np.full(4, 50), epochs=2000, weights=weights)
    seen = np.mean([np.bincount(epoch_rows(made, epoch) // 10, minlength=4) for epoch in range(2000)], axis=0)
    assert seen == pytest.approx(weights, abs=0.05)


class TestDeal:
    @given(LENGTHS, st.integers(1, 40))
    def test_all_cells_are_dealt_once_and_evenly(self, lengths, n):
        parts = deal(lengths, n)
        assert len(parts) == n
        assert sorted(np.concatenate(parts)) == list(range(len(lengths)))
        tokens = [lengths[part].sum() for part in parts]
        assert max(tokens) - min(tokens) <= lengths.max()
        assert min(map(len, parts)) >= len(lengths) // n

    def test_long_cells_are_spread(self):
        lengths = np.random.default_rng(0).integers(200, 1200, size=1000)
        tokens = [lengths[part].sum() for part in deal(lengths, 16)]
        assert max(tokens) / min(tokens) < 1.01


class TestGroupWeights:
    codes = np.repeat([0, 1, 3], [60, 30, 10])
    names = ("blood", "skin", "none", "lung")

    @pytest.mark.parametrize(("power", "shares"), [(0.0, [0.6, 0.3, 0.1]), (1.0, [1 / 3] * 3), (0.5, np.sqrt([6, 3, 1]))])
    def test_power(self, power, shares):
        weights = group_weights(self.codes, self.names, power, {})
        assert weights.mean() == pytest.approx(1)
        found = np.array([weights[self.codes == code].sum() for code in (0, 1, 3)])
        assert found / found.sum() == pytest.approx(np.array(shares) / np.sum(shares))

    def test_factors(self):
        weights = group_weights(self.codes, self.names, 0.0, {"skin": 2.0, "lung": 0.0})
        assert weights.mean() == pytest.approx(1)
        assert weights[60] == pytest.approx(2 * weights[0])
        assert not weights[90:].any()

    def test_unknown_group(self):
        with pytest.raises(InputError, match=r"no group 'blod'(.|\n)*'blood'"):
            group_weights(self.codes, self.names, 0.0, {"blod": 2.0})

    def test_nothing_left(self):
        with pytest.raises(InputError, match="leaves out every group"):
            group_weights(self.codes, self.names, 0.0, {"blood": 0, "skin": 0, "lung": 0})


def test_a_million_cells_take_no_time():
    import time

    lengths = np.random.default_rng(0).integers(100, 1200, size=1_000_000)
    began = time.process_time()
    made = plan(lengths, tokens_per_step=500_000, epochs=6)
    assert len(made.rows_of(made.n_steps - 1)) > 400
    assert made.n_steps == 6 * int(np.ceil(lengths.sum() / 500_000))
    assert time.process_time() - began < 3
