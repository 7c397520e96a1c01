"""Which genes are hidden or asked: the right number, uniformly, by cell, and nothing lost on the way."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from annformer.masking import ask, hide_values
from annformer.tokens import TokenBatch

GOLDEN = Path(__file__).parent / "golden" / "tokenization"
CLS = 1000


def batch_of(lengths: list[int], seed: int = 0) -> TokenBatch:
    """Cells with so many genes each, ids ascending, bins at random."""
    rng = np.random.default_rng(seed)
    ids = [np.r_[CLS, np.sort(rng.choice(900, n, replace=False))] for n in lengths]
    values = [np.r_[-2.0, rng.integers(1, 51, n)] for n in lengths]
    offsets = torch.from_numpy(np.cumsum([0, *(n + 1 for n in lengths)]))
    return TokenBatch(
        gene_ids=torch.from_numpy(np.concatenate([np.zeros(0, int), *ids])),
        values=torch.from_numpy(np.concatenate([np.zeros(0), *values])).float(),
        flags=None,
        dose=None,
        offsets=offsets,
        n_visible=offsets.diff(),
        targets=None,
        modality=None,
        labels={"batch": torch.arange(len(lengths))},
        cell=None,
    ).check()


def cells(tokens: TokenBatch, *names: str) -> list[list[list[float]]]:
    columns = [getattr(tokens, name).tolist() for name in names]
    return [[column[a:b] for column in columns] for a, b in pairwise(tokens.offsets.tolist())]


def alone(tokens: TokenBatch, i: int) -> TokenBatch:
    a, b = tokens.offsets[i : i + 2].tolist()
    one = torch.tensor([0, b - a])
    return tokens._replace(gene_ids=tokens.gene_ids[a:b], values=tokens.values[a:b], offsets=one, n_visible=one.diff(), labels={})


def chosen(tokens: TokenBatch) -> list[int]:
    return tokens.gene_ids[tokens.targets.isfinite()].tolist()


LENGTHS = st.lists(st.integers(0, 60), max_size=9)
SHARES = st.sampled_from([0.0, 0.15, 0.25, 0.4, 0.5, 0.75, 1.0])


@given(LENGTHS, SHARES, st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_hidden_values(lengths: list[int], share: float, seed: int) -> None:
    tokens = batch_of(lengths, seed)
    found = hide_values(tokens, share, seed=seed).check()
    hidden = found.targets.isfinite()
    assert torch.equal(torch.where(hidden, found.targets, found.values), tokens.values)
    assert torch.equal(hidden, found.values == -1)
    assert not hidden[tokens.offsets[:-1]].any()
    assert [int(hidden[a:b].sum()) for a, b in pairwise(tokens.offsets.tolist())] == [int(n * share) for n in lengths]
    assert torch.equal(found.n_visible, tokens.n_visible)
    assert torch.equal(found.gene_ids, tokens.gene_ids)


@given(LENGTHS, SHARES, st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_asked_genes(lengths: list[int], share: float, seed: int) -> None:
    tokens = batch_of(lengths, seed)
    found = ask(tokens, [share], seed=seed).check()
    assert torch.equal(found.offsets, tokens.offsets)
    assert (found.offsets.diff() - found.n_visible).tolist() == [int(n * share) for n in lengths]
    before, after = cells(tokens, "gene_ids", "values"), cells(found, "gene_ids", "values", "targets")
    for (ids, values), (new_ids, new_values, targets), n_visible in zip(before, after, found.n_visible.tolist(), strict=True):
        visible, asked = new_ids[:n_visible], new_ids[n_visible:]
        assert visible[0] == CLS
        assert sorted(visible[1:]) == visible[1:]
        assert sorted(asked) == asked
        assert sorted(visible + asked) == sorted(ids)
        assert all(np.isnan(targets[:n_visible]))
        assert new_values[n_visible:] == [0.0] * len(asked)
        assert dict(zip(new_ids, new_values[:n_visible] + targets[n_visible:], strict=True)) == dict(zip(ids, values, strict=True))


@pytest.mark.parametrize("length", [50, 100])
def test_sizes_like_the_references_collator(length: int) -> None:
    golden, inputs = np.load(GOLDEN / f"collator_both_sample_{length}.npz"), np.load(GOLDEN / "collator_inputs.npz")
    n_asked, n_visible = ((golden[name] != 200).sum(1) for name in ("gen_gene", "pcpt_gene"))
    tokens = batch_of([min(len(inputs[f"genes{i}"]), length) - 1 for i in range(4)])
    found = ask(tokens, [0.25], seed=0)  # the share that was drawn there
    assert found.n_visible.tolist() == n_visible.tolist()
    assert (found.offsets.diff() - found.n_visible).tolist() == n_asked.tolist()


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_choice_is_uniform(share: float) -> None:
    n_genes, n = 25, 2000
    tokens = batch_of([n_genes])
    chosen = np.zeros((n, n_genes))
    for step in range(n):
        chosen[step] = hide_values(tokens, share, seed=4, step=step).targets.isfinite().numpy()[1:]
    p = int(n_genes * share) / n_genes
    statistic = ((chosen.sum(0) - n * p) ** 2 / (n * p * (1 - p))).sum() * (n_genes - 1) / n_genes  # chi-square, n_genes - 1 degrees
    assert 7 < statistic < 55
    correlation = np.corrcoef(chosen.T)[np.triu_indices(n_genes, 1)]
    np.testing.assert_allclose(correlation.mean(), -1 / (n_genes - 1), atol=0.01)
    assert np.abs(correlation).max() < 0.15


def test_share_is_drawn_per_step() -> None:
    tokens, shares = batch_of([40, 20]), [0.25, 0.5, 0.75]
    drawn = [(found.offsets.diff() - found.n_visible).tolist() for found in (ask(tokens, shares, seed=0, step=step) for step in range(300))]
    counts = [drawn.count([10, 5]), drawn.count([20, 10]), drawn.count([30, 15])]
    assert sum(counts) == 300
    assert min(counts) > 70


@pytest.mark.parametrize("mask", [hide_values, lambda tokens, share, **key: ask(tokens, [share], **key)])
def test_a_cell_is_masked_the_same_in_every_batch(mask: object) -> None:
    tokens = batch_of([30, 0, 55, 12])
    together = cells(mask(tokens, 0.4, seed=5, step=2), "gene_ids", "targets")
    for i in range(4):
        np.testing.assert_equal(cells(mask(alone(tokens, i), 0.4, seed=5, step=2), "gene_ids", "targets")[0], together[i])


@pytest.mark.parametrize("mask", [hide_values, lambda tokens, share, **key: ask(tokens, [share], **key)])
def test_seed_and_step_choose_anew(mask: object) -> None:
    tokens = batch_of([30, 55])
    first, again, seed, step = (
        chosen(mask(tokens, 0.4, **key)) for key in ({"seed": 5}, {"seed": 5, "step": 0}, {"seed": 6}, {"seed": 5, "step": 1})
    )
    assert first == again
    assert seed != first != step


def test_everything_about_a_token_moves_with_it() -> None:
    tokens = batch_of([30, 17])
    tokens = tokens._replace(flags=tokens.gene_ids + 1, dose=tokens.gene_ids.float() / 2, modality=tokens.gene_ids * 3)
    found = ask(tokens, [0.5], seed=0).check()
    assert not torch.equal(found.gene_ids, tokens.gene_ids)
    assert torch.equal(found.flags, found.gene_ids + 1)
    assert torch.equal(found.dose, found.gene_ids.float() / 2)
    assert torch.equal(found.modality, found.gene_ids * 3)
    assert found.labels is tokens.labels


def test_arguments_are_not_edited() -> None:
    tokens = batch_of([30, 17])
    before = tokens.gene_ids.clone(), tokens.values.clone()
    hide_values(tokens, 0.5, seed=0)
    ask(tokens, [0.5], seed=0)
    assert torch.equal(tokens.gene_ids, before[0])
    assert torch.equal(tokens.values, before[1])
