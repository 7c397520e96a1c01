"""The three values that travel: cells as a source gives them, cells as the network reads them, what it says about them.

Axes, here and in every shape annotation: `cell`, `token` (a gene of a cell, or its `<cls>`), `row` (a token whose state was asked for),
`gene`, `width`, `head`, `class`. A batch of cells is *packed*: all tokens of all cells stand in one row without padding and `offsets` says
where each cell begins. Inside a cell the order is `<cls>`, visible genes, asked genes; `n_visible` counts the first two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_array


class Measured(NamedTuple):
    """Which genes the studies of some cells measured, expressed or not."""

    genes: Bool[np.ndarray, "study gene"]
    study: Int[np.ndarray, "cell"]
    """Row of `genes` that holds for each cell."""


def without_logarithm(values: Float[np.ndarray, "value"], base: float) -> Float[np.ndarray, "value"]:
    """Undo log(1 + x) to this base, in float64."""
    return np.expm1(values.astype(np.float64) * np.log(base))


class CellBatch(NamedTuple):
    """Cells as a source gives them: sparse expression over genes that the vocabulary knows."""

    counts: csr_array
    """cell x gene, canonical CSR: sorted, no duplicates, no stored zeros; float32 or float64, finite, >= 0."""
    gene_ids: Int[np.ndarray, "gene"]
    """Vocabulary id of each column; no id twice."""
    rows: Int[np.ndarray, "cell"]
    """Where the cells stood in their source; provenance only."""
    labels: dict[str, Int[np.ndarray, "cell"]]
    """Integer codes of the columns asked for, by role (`batch`, `cell_type`, ...)."""
    measured: Measured | None = None
    """Which columns can tell a zero, where the cells are of several studies; no cell expresses a gene that its study did not measure.
    None: every column, in every cell."""
    base: float | None = None
    """`counts` holds logarithms of 1 + x to this base; None: counts, or whatever else is not logarithms."""

    def in_counts(self) -> Self:
        """The same cells with their logarithms undone, if they are some."""
        if self.base is None:
            return self
        counts = self.counts.copy()
        counts.data = without_logarithm(counts.data, self.base)
        return self._replace(counts=counts, base=None)

    @property
    def n_measured(self) -> Int[np.ndarray, "cell"]:
        """Genes that were measured, of every cell."""
        if self.measured is None:
            return np.full(len(self.rows), len(self.gene_ids))
        studies, place = np.unique(self.measured.study, return_inverse=True)
        return np.count_nonzero(self.measured.genes[studies], axis=1)[place]

    def over(self, gene_ids: Int[np.ndarray, "panel"]) -> Self:
        """Only the columns of these genes, as far as they are there, in ascending id."""
        columns = np.flatnonzero(np.isin(self.gene_ids, gene_ids))
        columns = columns[np.argsort(self.gene_ids[columns])]
        measured = None if self.measured is None else self.measured._replace(genes=self.measured.genes[:, columns])
        return self._replace(counts=self.counts[:, columns], gene_ids=self.gene_ids[columns], measured=measured)

    def take(self, cells: Int[np.ndarray, "some"]) -> Self:
        """Only the given cells, in this order."""
        labels = {role: codes[cells] for role, codes in self.labels.items()}
        measured = None if self.measured is None else self.measured._replace(study=self.measured.study[cells])
        return self._replace(counts=self.counts[cells], rows=self.rows[cells], labels=labels, measured=measured)


class Profile(NamedTuple):
    """What cells express, packed: all their genes of the vocabulary, in ascending id, also those that became no token."""

    gene_ids: Int[Tensor, "expressed"]
    levels: Float[Tensor, "expressed"]
    """log(1 + 10,000 x count / library size); 0 where the gene is hidden from the network."""
    offsets: Int[Tensor, "cell+1"]

    def to(self, device: torch.device | str) -> Self:
        """Copy to `device`."""
        return type(self)(*(values.to(device, non_blocking=True) for values in self))

    def part(self, first: int, last: int) -> Self:
        """Cells `first` to `last`; the tensors of genes are views."""
        begin, end = int(self.offsets[first]), int(self.offsets[last])
        return type(self)(self.gene_ids[begin:end], self.levels[begin:end], self.offsets[first : last + 1] - begin)

    def take(self, cells: Int[Tensor, "some"]) -> Self:
        """Only the given cells, in this order."""
        offsets, places = places_of(self.offsets, cells)
        return type(self)(self.gene_ids[places], self.levels[places], offsets)


def places_of(offsets: Int[Tensor, "cell+1"], cells: Int[Tensor, "some"]) -> tuple[Int[Tensor, "some+1"], Int[Tensor, "token"]]:
    """Offsets of some cells of a packed batch, packed by themselves, and where their tokens stood."""
    lengths = offsets.diff()[cells]
    new = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    return new, torch.arange(int(new[-1]), device=offsets.device) - torch.repeat_interleave(new[:-1] - offsets[cells], lengths)


class TokenBatch(NamedTuple):
    """Cells as the network reads them, packed."""

    gene_ids: Int[Tensor, "token"]
    values: Float[Tensor, "token"]
    """The token's value: its value bin, -1 where hidden, the `<cls>` value first in each cell. Not read at asked tokens."""
    flags: Int[Tensor, "token"] | None
    """Condition of the token (0 none, 1 perturbed, ...); needs `n_flags` in the ModelConfig."""
    dose: Float[Tensor, "token"] | None
    offsets: Int[Tensor, "cell+1"]
    n_visible: Int[Tensor, "cell"]
    """Tokens of the cell that others may attend to, `<cls>` included; the tokens after them are asked."""
    targets: Float[Tensor, "token"] | None
    """Value to predict; NaN where nothing is asked."""
    modality: Int[Tensor, "token"] | None
    labels: dict[str, Int[Tensor, "cell"]]
    cell: Float[Tensor, "cell width"] | None
    """Given cell states that replace the embedded `<cls>`: to generate from (cell prompt)."""
    expression: Float[Tensor, "cell panel"] | None = None
    """Log-normalised expression of the genes of the model's panel, NaN where a gene was not measured; needs `view` in the ModelConfig."""
    profile: Profile | None = None
    """What the cells express; needs `profile` in the ModelConfig."""

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.offsets.shape[0] - 1

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all cells together."""
        return self.gene_ids.shape[0]

    def cell_of_token(self) -> Int[Tensor, "token"]:
        """For every token the number of its cell."""
        return torch.repeat_interleave(
            torch.arange(self.n_cells, device=self.offsets.device), self.offsets.diff(), output_size=self.n_tokens
        )

    def to(self, device: torch.device | str) -> Self:
        """Copy to `device`; tensors already there are shared."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for name, value in self._asdict().items()
        }
        if self.profile is not None:
            moved["profile"] = self.profile.to(device)
        moved["labels"] = {name: value.to(device, non_blocking=True) for name, value in self.labels.items()}
        return type(self)(**moved)

    def check(self) -> Self:
        """Assert everything the class says about itself; return it unchanged.

        For tests and for code that builds batches by hand: a broken batch is our fault, so this raises AssertionError.
        """
        n, cells = self.n_tokens, self.n_cells
        assert cells >= 0, "offsets must have at least one entry"
        assert int(self.offsets[0]) == 0, f"offsets start at {int(self.offsets[0])}, not 0"
        assert int(self.offsets[-1]) == n, f"offsets end at {int(self.offsets[-1])}, but there are {n} tokens"
        lengths = self.offsets.diff()
        assert bool((lengths >= 1).all()), "every cell has at least its <cls>"
        assert bool(((self.n_visible >= 1) & (self.n_visible <= lengths)).all()), "1 <= n_visible <= length in every cell"
        for name in ("values", "flags", "dose", "targets", "modality"):
            value = getattr(self, name)
            assert value is None or value.shape == (n,), f"{name} has shape {tuple(value.shape)}, expected ({n},)"
        assert bool(torch.isfinite(self.values).all()), "values must be finite"
        if self.targets is not None:
            asked = (
                torch.arange(n, device=self.offsets.device) - self.offsets[:-1][self.cell_of_token()]
                >= self.n_visible[self.cell_of_token()]
            )
            assert bool(torch.isfinite(self.targets[asked]).all()), "every asked token has a finite target"
            assert bool((asked | (self.values == -1) | self.targets.isnan()).all()), (
                "a target stands at an asked token or at a hidden value (-1)"
            )
        for name, label in self.labels.items():
            assert label.shape == (cells,), f"label {name!r} has shape {tuple(label.shape)}, expected ({cells},)"
        assert self.cell is None or self.cell.shape[0] == cells, "cell holds one state per cell"
        assert self.expression is None or self.expression.shape[0] == cells, "expression holds one row per cell"
        if self.profile is not None:
            assert self.profile.offsets.shape == (cells + 1,), "the profile holds every cell"
            assert self.profile.gene_ids.shape == self.profile.levels.shape == (int(self.profile.offsets[-1]),), "a level for every gene"
        return self


class Encoded(NamedTuple):
    """What the network says about a `TokenBatch`."""

    states: Float[Tensor, "row width"]
    """Output of the last layer at `rows`."""
    rows: Int[Tensor, "row"] | None
    """The tokens that `states` stand for, ascending; None: all tokens."""
    genes: Float[Tensor, "token width"]
    """Output of the gene encoder: no value, no context."""
    cell: Float[Tensor, "cell width"]
    """State of `<cls>`: the cell embedding."""
    context: Float[Tensor, "token width"] | None
    """Batch + modality embedding that the heads append to the states; never fed to the transformer."""
