"""The linear part of the cell embedding: what it reads, what is hidden from it, what it begins at, how it is kept."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.decomposition import PCA

from annformer import embed
from annformer.data.anndata import AnnDataSource
from annformer.data.random_cells import MemoryCells
from annformer.errors import InputError
from annformer.inference import encode_cells
from annformer.masking import ask, hide_values
from annformer.model.profile import ExpressionProfile
from annformer.scgpt import ScGPT
from annformer.tokenizer import tokenize
from annformer.train.gene_init import principal_axes, settle_untrained, start_profile_at
from annformer.train.offenders import take_cells


@pytest.fixture
def adata(tiny_adata):
    return tiny_adata()


@pytest.fixture
def cells(adata, tiny_vocab):
    return next(AnnDataSource(adata).batches(60, vocab=tiny_vocab))


@pytest.fixture
def profiled(tiny_model, tiny_vocab):
    """The tiny model with a profile that says something."""
    config = tiny_model.config
    model = ScGPT(config.with_(model=config.model.with_(profile=True).model_dump()), tiny_vocab).eval()
    model.load_state_dict(tiny_model.state_dict(), strict=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.nn.init.normal_(model.encoder.profile.gene.weight)
        torch.nn.init.normal_(model.encoder.profile.origin)
    return model


def dense(cells, n_tokens):
    """Log-normalised expression, a column per token."""
    counts = cells.counts.toarray()
    levels = np.zeros((len(counts), n_tokens))
    levels[:, cells.gene_ids] = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    return levels


def states(model, adata, **options):
    return np.concatenate([found for _, found in encode_cells(model, AnnDataSource(adata), **options)])


def test_the_cell_embedding_is_cls_and_a_linear_reading_of_all_genes(profiled, tiny_model, cells, tiny_vocab):
    tokens = profiled.tokenize(cells).check()
    profile = profiled.encoder.profile
    read = torch.from_numpy(dense(cells, len(tiny_vocab))).float() @ profile.gene.weight / 32 + profile.origin
    plain = tiny_model.encode(tiny_model.tokenize(cells), "cell").cell
    assert torch.allclose(profiled.encode(tokens, "cell").cell, plain + read, atol=1e-4)
    few = profiled.tokenize(cells, profiled.tokenizer.with_(max_length=10))
    assert torch.equal(few.profile.levels, tokens.profile.levels)


def test_levels_of_counts_large_and_small_and_of_other_numbers(tiny_vocab, tiny_model):
    values = np.zeros((3, len(tiny_vocab.genes)), np.float32)
    values[0, :4], values[1, :5], values[2, :3] = [1, 255, 256, 70_000], [0.25, 1.5, 2, 2, 300.75], [1, 1, 2]
    cells = next(
        AnnDataSource(ad.AnnData(sp.csr_matrix(values), var={"names": list(tiny_vocab.genes)}), gene_key="names").batches(
            3, vocab=tiny_vocab
        )
    )
    profile = tokenize(cells, tiny_model.tokenizer, cls_id=tiny_vocab.cls_id, profile=True).profile
    expected = dense(cells, len(tiny_vocab))
    cell = torch.repeat_interleave(torch.arange(3), profile.offsets.diff()).numpy()
    assert len(cell) == 12
    np.testing.assert_allclose(profile.levels, expected[cell, profile.gene_ids], rtol=1e-6)


def test_it_begins_at_nothing(cells, tiny_model, tiny_vocab):
    profile = tokenize(cells, tiny_model.tokenizer, cls_id=tiny_vocab.cls_id, profile=True).profile
    assert torch.equal(ExpressionProfile(len(tiny_vocab), 8)(profile), torch.zeros(60, 8))


def test_column_order_and_empty_cells(profiled, adata):
    expected = states(profiled, adata)
    assert np.allclose(states(profiled, adata[:, ::-1].copy()), expected, atol=1e-5)
    emptied = adata.copy()
    counts = emptied.X.toarray()
    counts[[0, 7, 59]] = 0
    emptied.X = sp.csr_matrix(counts)
    found = states(profiled, emptied)
    assert np.isnan(found[[0, 7, 59]]).all()
    rest = np.setdiff1d(np.arange(60), [0, 7, 59])
    assert np.allclose(found[rest], expected[rest], atol=1e-5)


def test_the_same_in_parts_and_for_logarithms_of_both_bases(profiled, adata, cells):
    assert np.allclose(states(profiled, adata, size=7, max_tokens=300), states(profiled, adata), atol=1e-5)
    expected = profiled.tokenize(cells).profile.levels
    shares = adata.X.toarray() / adata.X.sum(axis=1) * 1e4
    for logarithm in (np.log1p, lambda x: np.log2(1 + x)):
        other = ad.AnnData(sp.csr_matrix(np.asarray(logarithm(shares), np.float32)), obs=adata.obs, var=adata.var)
        found = next(AnnDataSource(other).batches(60, vocab=profiled.vocab))
        assert torch.allclose(profiled.tokenize(found).profile.levels, expected, atol=1e-3)


@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize("hide", [lambda tokens: ask(tokens, [0.5], seed=3), lambda tokens: hide_values(tokens, 0.5, seed=3)])
def test_what_is_asked_is_hidden_and_the_rest_is_louder(profiled, cells, hide, zeros):
    before = profiled.tokenize(cells, profiled.tokenizer.with_(zeros=zeros))
    after = hide(before).check()
    asked_of = after.cell_of_token()[after.targets.isfinite()], after.gene_ids[after.targets.isfinite()]
    offsets = before.profile.offsets
    n_hidden = 0
    for cell in range(60):
        part = slice(int(offsets[cell]), int(offsets[cell + 1]))
        hidden = torch.isin(before.profile.gene_ids[part], asked_of[1][asked_of[0] == cell])
        n_hidden += int(hidden.sum())
        assert torch.equal(after.profile.levels[part] == 0, hidden)
        louder = len(hidden) / max(1, int((~hidden).sum()))
        assert torch.allclose(after.profile.levels[part][~hidden], before.profile.levels[part][~hidden] * louder)
    assert n_hidden > 0 and bool((before.profile.levels > 0).all())


def test_some_cells_of_a_batch_are_what_they_were(profiled, cells):
    some = torch.tensor([5, 2, 40])
    part = take_cells(profiled.tokenize(cells), some).check()
    whole = profiled.encode(profiled.tokenize(cells), "cell").cell
    assert torch.allclose(profiled.encode(part, "cell").cell, whole[some], atol=1e-5)


def test_it_begins_at_the_principal_axes(cells, adata, tiny_vocab, tiny_model):
    memory = MemoryCells(AnnDataSource(adata), tiny_vocab)
    axes, mean = principal_axes(memory, np.arange(60), len(tiny_vocab), 10, seed=0)
    profile = ExpressionProfile(len(tiny_vocab), 32)
    start_profile_at(profile, axes, mean)
    read = profile(
        tiny_model.tokenize(cells)._replace(profile=tokenize(cells, tiny_model.tokenizer, cls_id=0, profile=True).profile).profile
    )
    expected = PCA(10, svd_solver="full").fit_transform(dense(cells, len(tiny_vocab)))
    found = read.detach().numpy()
    assert np.allclose(found[:, 10:], 0, atol=1e-4)
    for axis in range(10):
        assert abs(np.corrcoef(found[:, axis], expected[:, axis])[0, 1]) > 0.999
    assert np.isclose(np.sqrt((found**2).sum(1).mean()), np.sqrt(32), rtol=0.05)


def test_genes_never_met_have_no_direction(profiled):
    known = np.ones(len(profiled.vocab), dtype=bool)
    known[[4, 9]] = False
    settle_untrained(profiled, known)
    lengths = profiled.encoder.profile.gene.weight.norm(dim=1)
    assert (lengths[[4, 9]] == 0).all() and (lengths[torch.from_numpy(known)] > 0).all()


def test_a_batch_without_it_is_refused(profiled, tiny_model, cells):
    with pytest.raises(ValueError, match="needs the profile"):
        profiled.encode(tiny_model.tokenize(cells))
    with pytest.raises(ValueError, match="profile"):
        tiny_model.encode(profiled.tokenize(cells))


def test_kept_whole_or_in_half_the_room(profiled, adata, tmp_path):
    profiled.save_pretrained(tmp_path / "whole")
    profiled.save_pretrained(tmp_path / "half", half=True)
    expected = states(profiled, adata)
    assert np.array_equal(states(ScGPT.from_pretrained(tmp_path / "whole"), adata), expected)
    half = ScGPT.from_pretrained(tmp_path / "half")
    assert np.allclose(states(half, adata), expected, atol=0.02)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.55 * sizes[1]
    assert half.fingerprint != profiled.fingerprint


def test_models_without_it_are_what_they_were(tiny_model, tmp_path):
    before = tiny_model.fingerprint
    tiny_model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    text = path.read_text(encoding="utf-8")
    older = text.replace('    "profile": false,\n', "")
    assert older != text
    path.write_text(older, encoding="utf-8")
    assert ScGPT.from_pretrained(tmp_path / "model").fingerprint == before


def test_the_authors_code_cannot_express_it_unless_it_is_dropped(profiled, tiny_model, cells, tmp_path):
    drop = {"asked"}  # which has another reason
    with pytest.raises(InputError, match="profile"):
        profiled.save_for_authors(tmp_path / "theirs", drop=drop)
    notes = profiled.save_for_authors(tmp_path / "theirs", drop=drop | {"profile"})
    assert any("<cls> alone" in note for note in notes)
    again = ScGPT.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again.encode(again.tokenize(cells), "cell").cell, tiny_model.encode(tiny_model.tokenize(cells), "cell").cell)


def test_embeddings_hold_it(profiled, tiny_model, adata):
    with_it, without = adata.copy(), adata.copy()
    embed(with_it, profiled, progress=False)
    embed(without, tiny_model, progress=False)
    assert np.abs(with_it.obsm["X_annformer"] - without.obsm["X_annformer"]).max() > 0.01
