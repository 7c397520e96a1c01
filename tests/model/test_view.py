"""The expression view, and the model that has one: panel, library size, gaps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from annformer.data.anndata import AnnDataSource
from annformer.errors import InputError
from annformer.model.view import ExpressionView
from annformer.scgpt import ScGPT
from annformer.tokenizer import panel_expression


@pytest.fixture
def cells(tiny_adata, tiny_vocab):
    return next(AnnDataSource(tiny_adata()).batches(60, vocab=tiny_vocab))


@pytest.fixture
def viewing(tiny_model, tiny_vocab):
    names = tiny_vocab.genes[40:10:-3]
    config = tiny_model.config
    torch.manual_seed(1)
    return ScGPT(config.with_(model=config.model.with_(view=len(names)).model_dump(), panel=names), tiny_vocab).eval()


def test_expression_is_that_of_the_whole_cell(cells):
    panel = cells.gene_ids[[7, 3, 5]]
    dense = cells.counts.toarray()
    expected = np.log1p(dense[:, [7, 3, 5]] / dense.sum(1, keepdims=True) * 1e4)
    assert np.allclose(panel_expression(cells, panel), expected, rtol=1e-5)


def test_genes_that_were_not_measured_are_gaps_and_read_as_their_mean(cells):
    there, missing = cells.gene_ids[:2], np.array([cells.gene_ids.max() + 1])
    values = panel_expression(cells, np.concatenate((there[:1], missing, there[1:])))
    assert np.isnan(values[:, 1]).all() and np.isfinite(values[:, [0, 2]]).all()
    torch.manual_seed(0)
    view = ExpressionView(3, 4).eval()
    torch.nn.init.normal_(view.out.weight)
    view.mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    filled = torch.from_numpy(values).clone()
    filled[:, 1] = 2.0
    assert torch.equal(view(torch.from_numpy(values)), view(filled))


def test_it_begins_at_nothing_and_only_the_panel_is_read(viewing, tiny_model, cells):
    tokens = viewing.tokenize(cells)
    assert set(tokens.gene_ids.tolist()) <= {viewing.vocab.cls_id, *viewing.panel.tolist()}
    assert torch.equal(viewing.encoder.view(tokens.expression), torch.zeros(60, 32))
    torch.nn.init.normal_(viewing.encoder.view.out.weight)
    plain = viewing.encode(tokens, "all").states[tokens.offsets[:-1]]
    assert torch.allclose(viewing.encode(tokens, "cell").cell, plain + viewing.encoder.view(tokens.expression), atol=1e-5)


def test_a_batch_without_it_is_refused(viewing, tiny_model, cells):
    with pytest.raises(ValueError, match="needs the expression"):
        viewing.encode(tiny_model.tokenize(cells))
    with pytest.raises(ValueError, match="expression"):
        tiny_model.encode(viewing.tokenize(cells))


def test_saved_with_its_panel(viewing, cells, tmp_path):
    viewing.save_pretrained(tmp_path / "model")
    again = ScGPT.from_pretrained(tmp_path / "model")
    assert again.config.panel == viewing.config.panel
    assert torch.equal(again.encode(again.tokenize(cells), "cell").cell, viewing.encode(viewing.tokenize(cells), "cell").cell)
    with pytest.raises(InputError, match="cannot express"):
        again.save_for_authors(tmp_path / "theirs")


def test_a_panel_of_unknown_genes_is_refused(tiny_model, tiny_vocab):
    with pytest.raises(InputError, match="vocabulary lacks"):
        ScGPT(tiny_model.config.with_(panel=("NOGENE",)), tiny_vocab)
