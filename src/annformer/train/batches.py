"""Which cells stand in which step: a pure function of lengths, weights and seed, so that nothing has to be saved to resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from annformer.data.tables import unknown_name
from annformer.errors import input_error


class _Epoch(NamedTuple):
    """Cells of an epoch in order, and where its steps begin."""

    number: int
    order: Int[np.ndarray, "cell"]
    """Places in `BatchPlan.rows`."""
    cells: Int[np.ndarray, "step+1"]
    """Cells before each step."""
    tokens: Int[np.ndarray, "step+1"]
    """Tokens before each step."""


class BatchPlan:
    """The cells of every step of a run, all devices together.

    Each epoch is a permutation drawn from (seed, epoch), cut into steps of nearly equal numbers of tokens: as few as it takes to hold
    at most `tokens_per_step` on average. So there is no small last step, and every step has a cell.

    Parameters
    ----------
    rows
        Row numbers of the cells to train on.
    lengths
        Tokens of these cells.
    tokens_per_step
        At least the longest cell.
    epochs
        Times that the cells are gone through; may be a fraction.
    seed
        Another one gives another order.
    weights
        How often each cell is seen per epoch, on average; once where None. An epoch has as many cells as these add up to. A cell with
        weight 2.3 stands in every epoch two or three times.
    """

    def __init__(
        self,
        rows: Int[np.ndarray, "cell"],
        lengths: Int[np.ndarray, "cell"],
        *,
        tokens_per_step: int,
        epochs: float,
        seed: int,
        weights: Float[np.ndarray, "cell"] | None = None,
    ) -> None:
        assert len(rows) == len(lengths) > 0, "a plan has cells, and a length for each"
        assert tokens_per_step >= lengths.max(), "a step holds the longest cell"
        if weights is not None and not weights.all():
            rows, lengths, weights = (values[weights > 0] for values in (rows, lengths, weights))
        self.rows, self.lengths, self.weights, self.seed = rows, lengths, weights, seed
        self.cells_per_epoch = len(rows) if weights is None else max(1, round(float(weights.sum())))
        tokens = float(lengths.sum() if weights is None else lengths @ weights)
        self.steps_per_epoch = min(self.cells_per_epoch, max(1, int(np.ceil(tokens / tokens_per_step))))
        self.n_steps = max(1, round(epochs * self.steps_per_epoch))
        self._last: _Epoch | None = None
        self._totals: dict[int, int] = {}

    def rows_of(self, step: int) -> Int[np.ndarray, "cell"]:
        """Row numbers of a step's cells."""
        return self.rows[self._places(step)]

    def lengths_of(self, step: int) -> Int[np.ndarray, "cell"]:
        """Tokens of a step's cells, in the order of `rows_of`."""
        return self.lengths[self._places(step)]

    def epoch_of(self, step: int) -> float:
        """Epochs that are done when a step begins."""
        return step / self.steps_per_epoch

    def cells_until(self, step: int) -> int:
        """Cells of all steps before this one."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return epoch * self.cells_per_epoch + (int(self._epoch(epoch).cells[place]) if place else 0)

    def tokens_until(self, step: int) -> int:
        """Tokens of all steps before this one. With weights every epoch before it has to be drawn, once."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return sum(self._total(number) for number in range(epoch)) + (int(self._epoch(epoch).tokens[place]) if place else 0)

    def _places(self, step: int) -> Int[np.ndarray, "cell"]:
        assert 0 <= step < self.n_steps, f"the run has {self.n_steps} steps, there is no step {step}"
        number, place = divmod(step, self.steps_per_epoch)
        epoch = self._epoch(number)
        return epoch.order[epoch.cells[place] : epoch.cells[place + 1]]

    def _total(self, number: int) -> int:
        if self.weights is None:
            number = 0
        if number not in self._totals:
            self._totals[number] = int(self.lengths.sum()) if self.weights is None else int(self._epoch(number).tokens[-1])
        return self._totals[number]

    def _epoch(self, number: int) -> _Epoch:
        """Draw an epoch; the last one is kept, as steps are asked for in order."""
        if self._last is None or self._last.number != number:
            self._last = None  # so that there are never two in memory
            order = self._order(np.random.default_rng([self.seed, number]))
            self._last = _cut(number, order, self.lengths, self.steps_per_epoch)
        return self._last

    def _order(self, rng: np.random.Generator) -> Int[np.ndarray, "cell"]:
        order = _permutation(len(self.rows), rng)
        if self.weights is None:
            return order
        # one draw for all cells, in random order: every cell gets the whole part of its weight and, with the chance of the rest, one more,
        # and the number of all of them is always the same
        ends = np.cumsum(self.weights[order])
        ends *= self.cells_per_epoch / ends[-1]
        ends[-1] = self.cells_per_epoch
        ends += rng.random()
        np.floor(ends, out=ends)
        ends[1:] -= ends[:-1].copy()
        order = np.repeat(order, ends.astype(np.int32))
        return order[_permutation(len(order), rng)]


def _permutation(n: int, rng: np.random.Generator) -> Int[np.ndarray, "cell"]:
    """Permute 0 to n - 1 by sorting random numbers that carry the places in their lower bits: several times as fast as a shuffle."""
    bits = np.uint64(n.bit_length())
    keys = rng.integers(2**64, size=n, dtype=np.uint64)
    keys >>= bits
    keys <<= bits
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    return keys.astype(np.int32 if n < 2**31 else np.int64)


def _cut(number: int, order: Int[np.ndarray, "cell"], lengths: Int[np.ndarray, "cell"], n_steps: int) -> _Epoch:
    """Cut at equal numbers of tokens, with one cell at least in every step."""
    ends = np.cumsum(lengths[order], dtype=np.int64)
    steps = np.arange(n_steps + 1)
    cells = np.searchsorted(ends, steps * (int(ends[-1]) / n_steps), side="right")
    cells[0], cells[-1] = 0, len(order)
    cells = np.maximum.accumulate(cells - steps) + steps
    cells = np.minimum(cells, len(order) - steps[::-1])
    return _Epoch(number, order, cells, np.where(cells > 0, ends[cells - 1], 0))


def deal(lengths: Int[np.ndarray, "cell"], n: int) -> list[Int[np.ndarray, "part"]]:
    """Deal cells to `n` parts with nearly the same number of tokens: by length, there and back, as snakes move.

    The parts differ by less than the longest cell. Where there are fewer cells than parts the last parts are empty.
    """
    order = np.argsort(-lengths, kind="stable")
    turn, place = np.divmod(np.arange(len(order)), n)
    part = np.where(turn % 2 == 0, place, n - 1 - place)
    ends = np.cumsum(np.bincount(part, minlength=n))
    return np.split(order[np.argsort(part, kind="stable")], ends[:-1])


def group_weights(
    codes: Int[np.ndarray, "cell"], categories: Sequence[str], power: float, factors: Mapping[str, float]
) -> Float[np.ndarray, "cell"]:
    """How often each cell is seen, 1 on average, so that a group of n cells counts as n^(1 - power) times its factor.

    Parameters
    ----------
    codes
        Group of each cell.
    categories
        Names of the groups.
    power
        0: groups count as their cells do; 1: all alike.
    factors
        Further factors, by name; 1 where a group is not named.
    """
    for name in factors:
        if name not in categories:
            found = f"there is no group {name!r} to balance"
            raise unknown_name(found, name, categories, "one of", "train.balance.factors")
    counted = np.bincount(codes, minlength=len(categories))
    factor = np.array([factors.get(name, 1.0) for name in categories])
    of_group = factor * np.maximum(counted, 1.0) ** -power
    weights = of_group[codes]
    if not weights.any():
        found = "train.balance.factors leaves out every group that has cells to train on"
        raise input_error(found, "one group at least with a factor above 0", "correct train.balance.factors")
    return weights / weights.mean()
