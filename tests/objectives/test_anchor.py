"""The anchor objective: places by row, rows without one, no trace in the weights."""

from __future__ import annotations

import pytest
import torch

from annformer.model.config import ModelConfig
from annformer.objectives.anchor import Anchor, AnchorConfig
from annformer.tokens import Encoded, TokenBatch


@pytest.fixture
def anchor():
    torch.manual_seed(0)
    made = Anchor(AnchorConfig(n_components=3), ModelConfig(vocab_size=10, width=8))
    made.place(torch.arange(15.0).view(5, 3))
    return made


def batch(rows):
    offsets = torch.arange(len(rows) + 1)
    n = len(rows)
    ids, ones = torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.long)
    return TokenBatch(ids, torch.zeros(n), None, None, offsets, ones, None, None, {"row": torch.tensor(rows)}, None)


def encoded(n):
    cell = torch.randn(n, 8, requires_grad=True)
    return Encoded(states=cell, rows=None, genes=cell, cell=cell, context=None)


def test_distance_to_the_place_of_the_row(anchor):
    states = encoded(2)
    loss = anchor.losses(states, batch([4, 1]), lambda _: states)["anchor"]
    places = torch.tensor([[12.0, 13, 14], [3, 4, 5]])
    assert loss.n == 2
    assert torch.allclose(loss.mean, (anchor.predict(states) - places).square().mean())


def test_rows_without_a_place_do_not_count(anchor):
    anchor.place(torch.tensor([[1.0, 2, 3], [torch.nan] * 3]))
    states = encoded(2)
    tokens = batch([0, 1])
    loss = anchor.losses(states, tokens, lambda _: states)["anchor"]
    loss.total.backward()
    assert loss.n == 1 == anchor.counts(tokens)["anchor"]
    assert states.cell.grad[1].abs().sum() == 0 < states.cell.grad[0].abs().sum()


def test_places_are_no_weights(anchor):
    assert set(anchor.state_dict()) == {"out.weight", "out.bias"}


def test_without_places_it_says_so():
    fresh = Anchor(AnchorConfig(n_components=3), ModelConfig(vocab_size=10, width=8))
    with pytest.raises(ValueError, match=r"Anchor\.place"):
        fresh.counts(batch([0]))
