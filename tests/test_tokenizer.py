"""Cells to tokens: the reference's golden data where it is deterministic, its distribution where it draws, and what must not matter."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.stats import chisquare

from annformer.kernels import threshold
from annformer.tokenizer import TokenizerSettings, expressed, tokenize
from annformer.tokenizer.expressed import quantile_edges
from annformer.tokens import CellBatch, TokenBatch

GOLDEN = Path(__file__).parent / "golden"
BINNING = np.load(GOLDEN / "binning" / "binning.npz")
CASES = sorted(name.removesuffix(".input") for name in BINNING.files if name.endswith(".input"))
CLS = 100_000
LONG = 10**6


def cells_of(rows: np.ndarray | list, gene_ids: np.ndarray | None = None) -> CellBatch:
    rows = np.atleast_2d(np.asarray(rows))
    rows = rows if rows.dtype.kind == "f" else rows.astype(np.float64)
    gene_ids = np.arange(rows.shape[1]) if gene_ids is None else gene_ids
    return CellBatch(csr_array(rows), gene_ids, np.arange(len(rows)), {})


def tokens_of(rows: np.ndarray | list, gene_ids: np.ndarray | None = None, step: int = 0, **options: object) -> TokenBatch:
    return tokenize(cells_of(rows, gene_ids), TokenizerSettings(**options), cls_id=CLS, step=step).check()


def bins_of(row: np.ndarray | list, n_bins: int = 51, **options: int) -> np.ndarray:
    return tokens_of(row, n_bins=n_bins, max_length=LONG, **options).values.numpy()[1:].astype(int)


def interval(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest bin that the reference can draw (REFERENCE: left is the highest, `right` ends below the lowest)."""
    highest, below = np.digitize(values, edges), np.digitize(values, edges, right=True)
    return np.minimum(below + 1, highest), highest


def split(tokens: TokenBatch) -> list[tuple[list[int], list[float]]]:
    offsets = tokens.offsets.tolist()
    return [(tokens.gene_ids[a:b].tolist(), tokens.values[a:b].tolist()) for a, b in pairwise(offsets)]


def some_counts(n_cells: int = 12, n_genes: int = 300, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.negative_binomial(0.6, 0.15, (n_cells, n_genes)).astype(np.float32)


# the reference's binning


@pytest.mark.parametrize("n_bins", [51, 11, 5])
@pytest.mark.parametrize("case", CASES)
def test_binning_like_the_reference(case: str, n_bins: int) -> None:
    row = BINNING[f"{case}.input"]
    values = row[row != 0]
    found = bins_of(row, n_bins)
    if not len(values):
        assert len(found) == 0
        return
    highest, below = BINNING[f"{case}.n{n_bins}.left"], BINNING[f"{case}.n{n_bins}.right"]
    deterministic = highest - below <= 1
    drawn_by_reference = BINNING[f"{case}.n{n_bins}.out_seed1234"][row != 0]
    np.testing.assert_array_equal(found[deterministic], drawn_by_reference[deterministic])
    assert np.all((found > np.minimum(below, highest - 1)) & (found <= highest))


@pytest.mark.parametrize("n_bins", [51, 11, 5])
@pytest.mark.parametrize("case", [case for case in CASES if case != "zeros"])
def test_edges_are_the_references_bit_for_bit(case: str, n_bins: int) -> None:
    counts = cells_of(BINNING[f"{case}.input"]).counts
    edges = quantile_edges(counts.indptr.astype(np.int64), counts.data, n_bins)
    np.testing.assert_array_equal(edges[0], BINNING[f"{case}.n{n_bins}.bins"])


@pytest.mark.parametrize("way", ["search", "table"])
def test_ties_are_drawn_with_the_references_distribution(way: str) -> None:
    golden = np.load(GOLDEN / "binning" / "digitize_random_counts.npz")
    for value, expected in zip(golden["values"], golden["counts"], strict=True):
        n = expected.sum()
        hashes, found = np.random.default_rng(1).integers(0, 2**64, n, np.uint64), np.empty(n, np.float32)
        every = np.arange(n, dtype=np.uint32)
        if way == "search":
            expressed._search(np.full(n, value), hashes, every, golden["bins"], found)
        else:
            expressed._look_up(np.full(n, value, np.uint32), hashes, every, int(value), golden["bins"], found)
        histogram = np.bincount(found.astype(int), minlength=len(expected))
        np.testing.assert_array_equal(histogram > 0, expected > 0)
        drawn = expected > 0
        assert drawn.sum() == 1 or chisquare(histogram[drawn]).pvalue > 1e-3


@pytest.mark.parametrize("case", ["mostly_ones", "const", "single"])
def test_ties_are_uniform_over_seeds(case: str) -> None:
    row = BINNING[f"{case}.input"]
    position = 0  # the first non-zero value
    lowest, highest = (bound[position] for bound in interval(row[row != 0], BINNING[f"{case}.n11.bins"]))
    drawn = np.array([bins_of(row, 11, seed=seed)[position] for seed in range(2000)])
    assert highest > lowest
    assert chisquare(np.bincount(drawn - lowest, minlength=highest - lowest + 1)).pvalue > 1e-3


def test_ties_of_neighbouring_genes_are_independent() -> None:
    row = np.ones(40)
    drawn = np.array([bins_of(row, 5, seed=seed) for seed in range(500)]) - 1
    pairs = np.bincount((drawn[:, ::2] * 4 + drawn[:, 1::2]).ravel(), minlength=16)  # apart: the test is not one for pairs that overlap
    assert chisquare(pairs).pvalue > 1e-3


def values_of(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    makers = {
        "counts": lambda: rng.geometric(0.4, n).astype(np.float32),
        "about the end of the table": lambda: rng.integers(1, 1020 + rng.integers(2, 9), n).astype(np.float32),
        "large": lambda: rng.lognormal(7, 2, n).astype(np.int64).astype(np.float32) + 1,
        "huge": lambda: rng.integers(1, 2**40, n).astype(np.float64),
        "log": lambda: np.log1p(rng.geometric(0.4, n) * np.float32(3.7)).astype(np.float32),
        "float32": lambda: rng.lognormal(0, 3, n).astype(np.float32),
        "float64": lambda: rng.lognormal(0, 3, n),
        "close": lambda: 1 + rng.integers(0, 5, n) * np.finfo(np.float64).eps,
    }
    return makers[kind]()


def tallied_edges(values: np.ndarray, n_bins: int) -> np.ndarray:
    """Quantiles without sorting where that is possible, else sorted ones."""
    counts, edges = np.empty(len(values), np.uint32), np.empty(n_bins - 1)
    largest = expressed._as_counts(values, counts)
    assert largest == (values.max() if values.max() < 1024 and np.all(values == values.astype(int)) else -1)
    if largest < 0:
        return quantile_edges(np.array([0, len(values)]), values, n_bins)[0]
    tallies = np.zeros((1024, 8), np.int32)
    expressed._tally(counts, largest, tallies, np.linspace(0, 1, n_bins - 1), edges)
    assert not tallies.any()
    return edges


@given(
    st.sampled_from(["counts", "about the end of the table", "large", "huge", "log", "float32", "float64", "close"]),
    st.integers(1, 400),
    st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_edges_and_bins_like_numpy(kind: str, n: int, seed: int) -> None:
    values = values_of(kind, n, np.random.default_rng(seed))
    for n_bins in (51, 5):
        expected = np.quantile(values.astype(np.float64), np.linspace(0, 1, n_bins - 1))
        edges = quantile_edges(np.array([0, n]), values, n_bins)[0]
        np.testing.assert_array_equal(edges, expected)
        np.testing.assert_array_equal(tallied_edges(values, n_bins), expected)
        found = bins_of(values, n_bins)
        for by in (expected, np.quantile(values, np.linspace(0, 1, n_bins - 1))):  # the second is what the reference does in float32
            lowest, highest = interval(values, by)
            assert np.all((found >= lowest) & (found <= highest))


@pytest.mark.parametrize("kinds", [("counts", "float32"), ("large", "counts"), ("log", "float32", "large", "counts")])
def test_cells_of_different_kinds_in_one_batch(kinds: tuple[str, ...]) -> None:
    rng = np.random.default_rng(3)
    rows = np.zeros((len(kinds) * 9, 200), np.float32)
    for i in range(len(rows)):
        n = rng.integers(1, 200)
        rows[i, rng.choice(200, n, replace=False)] = values_of(kinds[i % len(kinds)], n, rng)
    together = split(tokens_of(rows))
    assert together == [split(tokens_of(row))[0] for row in rows]
    for row, (_, bins) in zip(rows, together, strict=True):
        lowest, highest = interval(row[row > 0], np.quantile(row[row > 0].astype(np.float64), np.linspace(0, 1, 50)))
        assert np.all((bins[1:] >= lowest) & (bins[1:] <= highest))


# the reference's tokens


def collator_cells() -> tuple[np.ndarray, list[np.ndarray]]:
    golden = np.load(GOLDEN / "tokenization" / "collator_inputs.npz")
    rows = np.zeros((4, 200), np.float32)
    for i in range(4):
        rows[i, golden[f"genes{i}"][1:]] = golden[f"expr{i}"][1:]
    return rows, [golden[f"genes{i}"][1:] for i in range(4)]


@pytest.mark.parametrize(("length", "name"), [(100, "pcpt_trunc_100"), (50, "pcpt_sample_50")])
def test_tokens_like_the_references_collator(length: int, name: str) -> None:
    rows, genes = collator_cells()
    golden = np.load(GOLDEN / "tokenization" / f"collator_{name}.npz")
    for i, (ids, values) in enumerate(split(tokens_of(rows, max_length=length))):
        theirs = {int(g): float(v) for g, v in zip(golden["gene"][i], golden["expr"][i], strict=True) if g != 200}
        assert ids[0] == CLS
        assert values[0] == golden["expr"][i][0] == -2
        assert len(ids) == len(theirs) == min(length, len(genes[i]) + 1)
        assert set(ids[1:]) <= set(genes[i])
        if length > len(genes[i]):
            assert set(ids[1:]) == set(theirs) - {201}
        nonzero = rows[i][rows[i] > 0]
        edges = np.quantile(nonzero, np.linspace(0, 1, 50))  # over all genes, before sampling
        for gene, value in zip(ids[1:], values[1:], strict=True):
            (lowest,), (highest,) = interval(rows[i, [gene]], edges)
            assert lowest <= value <= highest
            assert gene not in theirs or lowest <= theirs[gene] <= highest
            assert gene not in theirs or lowest < highest or value == theirs[gene]


@pytest.mark.parametrize("length", [20, 100])
def test_tokens_like_the_references_tokenize_and_pad(length: int) -> None:
    golden = np.load(GOLDEN / "tokenization" / "tokenize_pad.npz")
    tokens = tokens_of(golden["data"], golden["gene_ids"], values="raw", cls_value=0.0, max_length=length)
    for i, (ids, values) in enumerate(split(tokens)):
        theirs_ids, theirs_values = golden[f"zero0_cls1_len{length}.genes"][i], golden[f"zero0_cls1_len{length}.values"][i]
        real = theirs_ids != 200
        assert (ids[0], values[0]) == (CLS, 0.0)
        assert len(ids) == real.sum()
        data = dict(zip(golden["gene_ids"].tolist(), golden["data"][i].tolist(), strict=True))
        assert all(data[gene] == value for gene, value in zip(ids[1:], values[1:], strict=True))
        if length == 100:
            assert ids[1:] == theirs_ids[real][1:].tolist()
            assert values[1:] == theirs_values[real][1:].tolist()


# choosing genes in long cells


def test_chosen_genes_are_uniform() -> None:
    n_genes, n_kept, n = 30, 10, 3000
    kept = np.zeros(n_genes)
    for seed in range(n):
        kept[[gene for gene in split(tokens_of(np.arange(1, n_genes + 1), max_length=n_kept + 1, seed=seed))[0][0] if gene != CLS]] += 1
    share = n_kept / n_genes
    statistic = ((kept - n * share) ** 2 / (n * share * (1 - share))).sum() * (n_genes - 1) / n_genes  # chi-square with n_genes - 1 degrees
    assert kept.sum() == n * n_kept
    assert 8 < statistic < 62


def test_ties_do_not_know_who_was_chosen() -> None:
    drawn = np.array([tokens_of(np.ones(60), max_length=21, n_bins=5, seed=seed).values.numpy()[1:] for seed in range(500)])
    assert chisquare(np.bincount(drawn.ravel().astype(int) - 1, minlength=4)).pvalue > 1e-3


@given(st.integers(2, 40), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_longer_choice_contains_the_shorter(max_length: int, seed: int) -> None:
    row = some_counts(1, 60, seed)
    short, long = (split(tokens_of(row, max_length=length, seed=seed))[0][0] for length in (max_length, max_length + 1))
    assert set(short) <= set(long)
    assert len(short) == min(max_length, (row > 0).sum() + 1)
    assert short[1:] == sorted(short[1:])


# what a cell depends on


@given(st.integers(0, 10**6), st.sampled_from([20, 1200]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_order_batch_and_dtype_do_not_matter(seed: int, max_length: int, logged: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = some_counts(7, 80, seed)
    rows = np.log1p(rows) if logged else rows
    ids = rng.choice(10_000, 80, replace=False)
    expected = split(tokens_of(rows, ids, max_length=max_length))
    row_order, column_order = rng.permutation(7), rng.permutation(80)
    shuffled = split(tokens_of(rows[row_order][:, column_order], ids[column_order], max_length=max_length))
    assert shuffled == [expected[i] for i in row_order]
    assert split(tokens_of(rows.astype(np.float64), ids, max_length=max_length)) == expected
    assert [cell for part in (rows[:2], rows[2:]) for cell in split(tokens_of(part, ids, max_length=max_length))] == expected


def test_unknown_columns_do_not_matter() -> None:
    rows = some_counts()
    wider = np.insert(rows, [10, 200], 0, axis=1)
    ids = np.insert(np.arange(300), [10, 200], [900, 901])
    assert split(tokens_of(wider, ids)) == split(tokens_of(rows))


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}])
def test_seed_and_step_draw_anew(change: dict[str, int]) -> None:
    rows = some_counts()
    first, second = tokens_of(rows, max_length=40), tokens_of(rows, max_length=40, **change)
    assert not torch.equal(first.gene_ids, second.gene_ids)
    assert torch.equal(first.offsets, second.offsets)
    assert torch.equal(second.gene_ids, tokens_of(rows, max_length=40, **change).gene_ids)


def test_a_single_value_changes_the_draws_of_its_cell_only() -> None:
    rows = some_counts(2)
    changed = rows.copy()
    changed[0, 7] += 1
    before, after = split(tokens_of(rows)), split(tokens_of(changed))
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_swapped_values_are_another_cell() -> None:
    row = np.ones(60, np.float32)
    one, other = row.copy(), row.copy()
    one[3], other[4] = 2, 2
    assert bins_of(one)[10:].tolist() != bins_of(other)[10:].tolist()


# the batch


def test_the_batch() -> None:
    rows = some_counts(3)
    rows[1] = 0
    cells = cells_of(rows)._replace(labels={"batch": np.array([2, 0, 1], np.int8)})
    tokens = tokenize(cells, TokenizerSettings(cls_value=0.0), cls_id=CLS).check()
    lengths = (rows > 0).sum(1) + 1
    assert tokens.offsets.diff().tolist() == tokens.n_visible.tolist() == lengths.tolist()
    assert split(tokens)[1] == ([CLS], [0.0])
    assert (tokens.gene_ids.dtype, tokens.values.dtype, tokens.offsets.dtype) == (torch.int64, torch.float32, torch.int64)
    assert tokens.labels["batch"].tolist() == [2, 0, 1]
    assert tokens.labels["batch"].dtype == torch.int64
    assert [tokens.flags, tokens.dose, tokens.targets, tokens.modality, tokens.cell] == [None] * 5


def test_no_cells() -> None:
    tokens = tokens_of(np.zeros((0, 5)))
    assert (tokens.n_cells, tokens.n_tokens) == (0, 0)


def test_raw_values() -> None:
    row = np.array([0, 2.5, 0, 70_000, 1e-3], np.float32)
    assert split(tokens_of(row, values="raw")) == [([CLS, 1, 3, 4], [-2.0, *row[row > 0].tolist()])]


def test_negative_values_are_binned_like_others() -> None:
    np.testing.assert_array_equal(bins_of([-1.5, 0, 2, 4, 8], 5), [1, 2, 3, 4])


def test_many_genes() -> None:
    row = np.ones(50_000, np.float32)
    ids, _ = split(tokens_of(row, max_length=1200))[0]
    assert len(set(ids)) == 1200


@given(st.integers(2, 500), st.integers(0, 10**6), st.data())
def test_the_threshold_passes_exactly_n(n_hashes: int, seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, n_hashes - 1))
    narrow = data.draw(st.booleans())
    hashes = np.unique(np.random.default_rng(seed).integers(0, 2 * n_hashes if narrow else 2**64, n_hashes, np.uint64) + np.uint64(narrow))
    if n < len(hashes):
        assert (hashes <= threshold(hashes, n)).sum() == n


def test_a_column_that_stands_twice_does_not_hang() -> None:
    counts = csr_array((np.ones(60, np.float32), np.repeat(np.arange(30), 2), [0, 60]), (1, 30))
    for max_length in (10, 11, 12, 13):
        cells = CellBatch(counts, np.arange(30), np.arange(1), {})
        assert tokenize(cells, TokenizerSettings(max_length=max_length), cls_id=CLS).n_tokens == max_length
