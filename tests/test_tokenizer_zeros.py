"""Genes that a cell does not express as tokens: how many, which ones, what they depend on, and what comes after takes them as they are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array, csr_matrix
from scipy.stats import chisquare

from annformer.data import AnnDataSource
from annformer.inference import encode_cells, estimate
from annformer.masking import ask, hide_values
from annformer.model.config import ModelConfig
from annformer.scgpt import ModelFolderConfig, ScGPT
from annformer.tokenizer import TokenizerSettings, n_kept, tokenize
from annformer.tokens import CellBatch, Measured, TokenBatch
from annformer.vocab import GeneVocab

CLS = 100_000
LONG = 10**6
SHARES = st.one_of(st.just("all"), st.sampled_from([0.3, 0.5, 1.0, 2.0]), st.floats(0.01, 4))
Cell = tuple[list[int], list[float]]


def some_counts(n_cells: int, n_genes: int, seed: int = 0) -> np.ndarray:
    """Cells of very different depth, one of them empty."""
    rng = np.random.default_rng(seed)
    rows = rng.poisson(rng.uniform(0.02, 1.5, (n_cells, 1)), (n_cells, n_genes)).astype(np.float32)
    rows[rng.integers(n_cells)] = 0
    return rows


def tokens_of(rows: np.ndarray, gene_ids: np.ndarray | None = None, step: int = 0, **options: Any) -> TokenBatch:
    rows = np.atleast_2d(rows)
    gene_ids = np.arange(rows.shape[1]) if gene_ids is None else gene_ids
    cells = CellBatch(csr_array(rows), gene_ids, np.arange(len(rows)), {})
    return tokenize(cells, TokenizerSettings(**options), cls_id=CLS, step=step).check()


def split(tokens: TokenBatch) -> list[Cell]:
    return [(tokens.gene_ids[a:b].tolist(), tokens.values[a:b].tolist()) for a, b in pairwise(tokens.offsets.tolist())]


def zeros_of(cell: Cell) -> list[int]:
    return [gene for gene, value in zip(*cell, strict=True) if value == 0]


# how many


@given(SHARES, st.integers(2, 90), st.integers(0, 10**6), st.sampled_from(["bins", "raw"]))
@settings(max_examples=80)
def test_tokens_are_expressed_genes_and_zeros(zeros: float | str, max_length: int, seed: int, values: str) -> None:
    rows = some_counts(6, 60, seed)
    found = split(tokens_of(rows, zeros=zeros, max_length=max_length, values=values))
    plain = split(tokens_of(rows, max_length=LONG, values=values))
    told = np.stack(n_kept((rows > 0).sum(1), 60, TokenizerSettings(zeros=zeros, max_length=max_length)))
    for row, cell, without, (n_expressed, n_zeros) in zip(rows, found, plain, told.T, strict=True):
        ids, values_here = cell
        bins = dict(zip(*without, strict=True))
        assert (ids[0], values_here[0]) == (CLS, -2)
        assert ids[1:] == sorted(set(ids[1:]))
        assert set(zeros_of(cell)) <= set(np.flatnonzero(row == 0))
        assert [v for v in values_here[1:] if v] == [bins[gene] for gene, v in zip(ids[1:], values_here[1:], strict=True) if v]
        assert (len(ids) - 1 - len(zeros_of(cell)), len(zeros_of(cell))) == (n_expressed, n_zeros)


@given(SHARES, st.integers(1, 300), st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=300)
def test_the_room_is_shared_in_proportion(zeros: float | str, room: int, n: int, n_unexpressed: int) -> None:
    expressed, found = (int(x[0]) for x in n_kept(np.array([n]), n + n_unexpressed, TokenizerSettings(zeros=zeros, max_length=room + 1)))
    if n == 0:
        assert (expressed, found) == (0, 0)
        return
    wanted = n_unexpressed if zeros == "all" else min(round(zeros * n), n_unexpressed)
    if n + wanted <= room:
        assert (expressed, found) == (n, wanted)
        return
    assert expressed + found == room
    assert expressed >= 1
    assert found <= wanted
    assert expressed == 1 or abs(expressed - room * n / (n + wanted)) <= 0.5
    if zeros != "all" and wanted < n_unexpressed:
        assert expressed == 1 or abs(found - zeros * expressed) <= 1 + zeros


@given(SHARES, st.integers(2, 70), st.integers(0, 10**6))
@settings(max_examples=40)
def test_a_longer_choice_contains_the_shorter(zeros: float | str, max_length: int, seed: int) -> None:
    rows = some_counts(3, 60, seed)
    shorter, longer = (split(tokens_of(rows, zeros=zeros, max_length=max_length + more)) for more in (0, 1))
    assert all(set(short[0]) <= set(long[0]) for short, long in zip(shorter, longer, strict=True))


def test_all_is_every_gene_and_cells_are_equally_long() -> None:
    rows, ids = some_counts(5, 40), np.random.default_rng(0).permutation(400)[:40]
    found = split(tokens_of(rows, ids, zeros="all"))
    for row, (genes, values) in zip(rows, found, strict=True):
        assert genes[1:] == (sorted(ids) if row.any() else [])
        assert sorted(np.array(genes[1:])[np.array(values[1:]) > 0]) == sorted(ids[row > 0])
    assert found == split(tokens_of(rows, ids, zeros=1000.0))


def test_more_zeros_than_there_are() -> None:
    assert split(tokens_of(np.array([1.0, 0, 3, 1]), zeros=2.0, values="raw")) == [([CLS, 0, 1, 2, 3], [-2, 1, 0, 3, 1])]
    assert split(tokens_of(np.array([1.0, 2, 3, 1]), zeros="all", values="raw")) == [([CLS, 0, 1, 2, 3], [-2, 1, 2, 3, 1])]


@pytest.mark.parametrize("zeros", [0.5, "all"])
def test_empty_cells_stay_lone(zeros: float | str) -> None:
    assert split(tokens_of(np.zeros((2, 5), np.float32), zeros=zeros)) == [([CLS], [-2.0])] * 2
    assert tokens_of(np.zeros((0, 5), np.float32), zeros=zeros).n_tokens == 0


# which genes were measured


@given(SHARES, st.integers(2, 90), st.integers(0, 10**6), st.booleans())
@settings(max_examples=60)
def test_genes_that_a_study_did_not_measure_are_no_zeros(zeros: float | str, max_length: int, seed: int, sorted_ids: bool) -> None:
    rng, rows = np.random.default_rng(seed), some_counts(8, 60, seed)
    study, genes = rng.integers(3, size=8), rng.random((3, 60)) < rng.uniform(0.1, 1, (3, 1))
    rows *= genes[study]
    ids = np.sort(rng.permutation(900)[:60]) if sorted_ids else rng.permutation(900)[:60]
    cells = CellBatch(csr_array(rows), ids, np.arange(8), {}, Measured(genes, study))
    options = TokenizerSettings(zeros=zeros, max_length=max_length)
    found = split(tokenize(cells, options, cls_id=CLS).check())
    told = np.stack(n_kept((rows > 0).sum(1), cells.n_measured, options)).T
    for row, which, cell, (n_expressed, n_zeros) in zip(rows, genes[study], found, told, strict=True):
        alone = tokens_of(row[which], ids[which], zeros=zeros, max_length=max_length)
        assert cell == split(alone)[0], "a cell among others is what it is in its own file"
        assert set(cell[0][1:]) <= set(ids[which])
        assert len(cell[0]) == 1 + n_expressed + n_zeros
        if zeros == "all" and row.any() and max_length > which.sum():
            assert cell[0][1:] == sorted(ids[which])


def test_cls_is_no_gene() -> None:
    with pytest.raises(AssertionError, match="<cls> is never measured"):
        tokens_of(np.ones(3), np.array([1, 2, CLS]), zeros=1.0)


# which ones


def test_zeros_are_drawn_uniformly_from_the_unexpressed_genes() -> None:
    row, n = np.zeros(40), 1500
    row[::4] = np.arange(1, 11)
    drawn = np.zeros(40)
    for seed in range(n):
        drawn[zeros_of(split(tokens_of(row, zeros=0.6, seed=seed))[0])] += 1
    share = 6 / 30
    statistic = ((drawn[row == 0] - n * share) ** 2 / (n * share * (1 - share))).sum() * 29 / 30  # chi-square with 29 degrees of freedom
    assert drawn.sum() == n * 6
    assert not drawn[row > 0].any()
    assert 11 < statistic < 60


def test_zeros_do_not_know_which_expressed_genes_were_kept() -> None:
    row = np.repeat([1.0, 0.0], 12)  # 6 + 6 of 12 + 12 are kept
    table = np.zeros((2, 2))
    for seed in range(1000):
        ids = split(tokens_of(row, zeros=1.0, max_length=13, seed=seed))[0][0]
        table[int(0 in ids), int(12 in ids)] += 1
    assert chisquare(table.ravel()).pvalue > 1e-3


def test_a_gene_more_in_the_data_takes_the_place_of_another_at_most() -> None:
    rows = some_counts(30, 60)
    rows = rows[(rows == 0).sum(1) > 20]  # more than are drawn
    narrow = split(tokens_of(rows, zeros=0.2))
    wide = split(tokens_of(np.insert(rows, 30, 0, axis=1), np.insert(np.arange(60), 30, 900), zeros=0.2))
    changes = [len(set(zeros_of(a)) ^ set(zeros_of(b))) for a, b in zip(narrow, wide, strict=True)]
    assert set(changes) == {0, 2}
    assert all(set(zeros_of(b)) - set(zeros_of(a)) <= {900} for a, b in zip(narrow, wide, strict=True))


# what they depend on


@given(st.integers(0, 10**6), st.sampled_from([0.5, 2.0, "all"]), st.sampled_from([20, 1200]), st.booleans())
@settings(max_examples=40)
def test_order_batch_and_dtype_do_not_matter(seed: int, zeros: float | str, max_length: int, logged: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = some_counts(7, 80, seed)
    rows = np.log1p(rows) if logged else rows
    ids = rng.choice(10_000, 80, replace=False)
    options: dict[str, Any] = {"zeros": zeros, "max_length": max_length}
    expected = split(tokens_of(rows, ids, **options))
    row_order, column_order = rng.permutation(7), rng.permutation(80)
    shuffled = split(tokens_of(rows[row_order][:, column_order], ids[column_order], **options))
    assert shuffled == [expected[i] for i in row_order]
    assert split(tokens_of(rows.astype(np.float64), ids, **options)) == expected
    assert [cell for part in (rows[:2], rows[2:]) for cell in split(tokens_of(part, ids, **options))] == expected


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}])
def test_seed_and_step_draw_anew(change: dict[str, int]) -> None:
    rows = some_counts(8, 200)
    first, second = tokens_of(rows, zeros=0.5), tokens_of(rows, zeros=0.5, **change)
    assert torch.equal(first.offsets, second.offsets)
    assert not torch.equal(first.gene_ids, second.gene_ids)
    assert torch.equal(second.gene_ids, tokens_of(rows, zeros=0.5, **change).gene_ids)


def test_another_value_in_a_cell_draws_its_zeros_anew() -> None:
    rows = np.tile(np.repeat([1.0, 0.0], [40, 160]), (2, 1))
    rows[1, 3] = 2
    first, second = split(tokens_of(rows, zeros=1.0))
    assert set(zeros_of(first)) != set(zeros_of(second))


# what comes after


@given(st.sampled_from([0.25, 0.5, 0.75]), st.sampled_from([1.0, "all"]), st.integers(0, 10**6))
@settings(max_examples=30)
def test_zeros_are_asked_and_hidden_like_other_genes(share: float, zeros: float | str, seed: int) -> None:
    tokens = tokens_of(some_counts(5, 60, seed), zeros=zeros)
    n_genes = (tokens.offsets.diff() - 1).tolist()
    asked, hidden = ask(tokens, [share], seed=seed).check(), hide_values(tokens, share, seed=seed).check()
    assert asked.targets is not None
    assert hidden.targets is not None
    for found in (asked, hidden):
        assert [int(found.targets[a:b].isfinite().sum()) for a, b in pairwise(found.offsets.tolist())] == [int(n * share) for n in n_genes]
        kept = torch.where(found.targets.isfinite(), found.targets, found.values)
        assert sorted(zip(found.gene_ids.tolist(), kept.tolist(), strict=True)) == sorted(
            zip(tokens.gene_ids.tolist(), tokens.values.tolist(), strict=True)
        )


def test_zeros_are_asked_as_often_as_expressed_genes() -> None:
    tokens, n = tokens_of(np.repeat([1.0, 0.0], 20), zeros="all"), 800
    times = torch.zeros(40)
    for step in range(n):
        asked = ask(tokens, [0.5], seed=0, step=step)
        assert asked.targets is not None
        times[asked.gene_ids[asked.targets.isfinite()]] += 1
    statistic = float(((times - n / 2) ** 2 / (n / 4)).sum()) * 39 / 40  # chi-square with 39 degrees of freedom
    assert 16 < statistic < 74


def test_zero_probabilities_learn_from_zeros() -> None:
    vocab = GeneVocab([f"G{i}" for i in range(60)]).with_specials()
    network = ModelConfig(vocab_size=len(vocab), width=16, n_heads=2, n_layers=1, ff_width=16, generative=True)
    objectives = {name: {"kind": name, "zero_probability": True} for name in ("gep", "gepc")}
    model = ScGPT(ModelFolderConfig.read({"model": network, "objectives": objectives}, where="here"), vocab).eval()
    tokens = ask(tokens_of(some_counts(5, 60), zeros=2.0), [0.5], seed=0)
    tokens = tokens._replace(gene_ids=torch.where(tokens.gene_ids == CLS, vocab.cls_id, tokens.gene_ids))
    head = model.objectives["gep"].nonzero[-1]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, 30.0)  # sure that everything is expressed: each zero costs 30, each other gene nothing
    losses = model.losses(tokens)
    assert tokens.targets is not None
    n_zero = int((tokens.targets == 0).sum())
    assert 0 < n_zero < int(losses["gep_nonzero"].n) == int(tokens.targets.isfinite().sum())
    torch.testing.assert_close(losses["gep_nonzero"].total, torch.tensor(30.0 * n_zero))
    assert torch.isfinite(losses["gepc_nonzero"].total)


@pytest.mark.parametrize("zeros", [1.0, "all"])
def test_embedding_with_zeros_does_not_depend_on_the_batch(tiny_model: ScGPT, tiny_adata: Any, zeros: float | str) -> None:
    adata = tiny_adata(n_obs=24)
    adata.X = csr_matrix(adata.X.toarray() * (np.arange(24) != 5)[:, None])
    source, options = AnnDataSource(adata), TokenizerSettings(zeros=zeros, max_length=150)
    whole, parts = (np.concatenate([cell for _, cell in encode_cells(tiny_model, source, settings=options, size=n)]) for n in (24, 5))
    np.testing.assert_allclose(whole, parts, rtol=0, atol=1e-6)
    assert np.flatnonzero(np.isnan(whole).any(1)).tolist() == [5]
    cells = next(source.batches(24, vocab=tiny_model.vocab))
    expected = tokenize(cells, options, cls_id=tiny_model.vocab.cls_id).n_tokens / 24
    assert estimate(tiny_model, source, settings=options).mean_tokens == pytest.approx(expected)
