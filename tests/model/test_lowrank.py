"""Low-rank fine-tuning: begins as the network, learns little, ends as plain weights."""

from __future__ import annotations

import pytest
import torch

from annformer.model import CellEncoder, ModelConfig
from annformer.model.lowrank import TUNED, add_low_rank, merge_low_rank
from annformer.tokens import TokenBatch


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return CellEncoder(ModelConfig(vocab_size=30, width=16, n_heads=2, n_layers=2, ff_width=24)).eval()


@pytest.fixture
def tokens():
    ids, offsets = torch.tensor([0, 3, 5, 7, 0, 2, 9]), torch.tensor([0, 4, 7])
    given = {"gene_ids": ids, "values": torch.arange(7.0), "offsets": offsets, "n_visible": offsets.diff(), "labels": {}}
    return TokenBatch(**given, **dict.fromkeys(("flags", "dose", "targets", "modality", "cell")))


def cell(encoder, tokens):
    return encoder(tokens, "cell").cell


def test_it_begins_as_the_network_itself(encoder, tokens):
    before = cell(encoder, tokens).detach()
    add_low_rank(encoder, 2)
    torch.testing.assert_close(cell(encoder, tokens), before)


def test_only_low_rank_numbers_learn(encoder, tokens):
    add_low_rank(encoder, 2)
    cell(encoder, tokens).square().sum().backward()
    learning = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert learning == {f"layers.{n}.{part}.parametrizations.weight.0.{side}" for n in (0, 1) for part in TUNED for side in ("up", "down")}


def test_merged_it_computes_what_it_computed_and_has_the_old_names(encoder, tokens):
    names = set(encoder.state_dict())
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    add_low_rank(encoder, 2)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(".up"):
                parameter.normal_()
    expected = cell(encoder, tokens).detach()
    merge_low_rank(encoder)
    assert set(encoder.state_dict()) == names
    torch.testing.assert_close(cell(encoder, tokens), expected)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    change = encoder.layers[0].qkv.weight.detach() - before["layers.0.qkv.weight"]
    assert torch.linalg.matrix_rank(change) == 2
    assert torch.equal(encoder.gene.weight, before["gene.weight"])
