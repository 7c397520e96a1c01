"""The network: what it computes does not depend on what it is asked to leave out, nor on who else is in the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from annformer.model import CellEncoder, ModelConfig
from annformer.model.encoder import EPS_INPUT_NORM, DomainNorm, ValueEncoder
from annformer.tokens import TokenBatch


def cells(lengths: list[int], n_visible: list[int] | None = None, seed: int = 0, vocab: int = 50, **fields: object) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    n = int(offsets[-1])
    visible = torch.tensor(n_visible or lengths)
    targets = torch.full((n,), torch.nan)
    position = torch.arange(n) - torch.repeat_interleave(offsets[:-1], offsets.diff())
    asked = position >= torch.repeat_interleave(visible, offsets.diff())
    targets[asked] = torch.randint(1, 51, (int(asked.sum()),), generator=generator).float()
    values = torch.randint(1, 51, (n,), generator=generator).double()
    values[offsets[:-1]] = -2
    ids = torch.randint(0, vocab, (n,), generator=generator)
    batch = TokenBatch(ids, values, None, None, offsets, visible, targets, None, {}, None)
    return batch._replace(**fields).check()  # type: ignore[arg-type]


def network(**changes: object) -> CellEncoder:
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=50, width=16, n_heads=4, n_layers=2, ff_width=24).with_(**changes)
    return CellEncoder(config).double().eval()


@pytest.mark.parametrize("n_visible", [None, [3, 1, 9]])
@pytest.mark.parametrize("wanted", ["cell", "targets"])
def test_asking_for_less_changes_nothing(wanted: str, n_visible: list[int] | None) -> None:
    model, tokens = network(project_asked=False), cells([5, 2, 9], n_visible)
    full, part = model(tokens), model(tokens, wanted)
    assert part.rows is not None
    assert torch.allclose(part.states, full.states[part.rows], atol=1e-12)
    assert torch.allclose(part.cell, full.cell, atol=1e-12)
    assert len(part.rows) == (3 if wanted == "cell" or n_visible is None else 3 + int(tokens.targets.isfinite().sum()))  # type: ignore[union-attr]


def test_a_cell_does_not_see_its_neighbours() -> None:
    model = network()
    alone, other = cells([5]), cells([7, 3], seed=9)
    joined = TokenBatch(
        torch.cat((alone.gene_ids, other.gene_ids)),
        torch.cat((alone.values, other.values)),
        None,
        None,
        torch.tensor([0, 5, 12, 15]),
        torch.tensor([5, 7, 3]),
        None,
        None,
        {},
        None,
    )
    assert torch.allclose(model(joined).cell[0], model(alone).cell[0], atol=1e-12)


def test_asked_tokens_do_not_reach_the_cell() -> None:
    model, tokens = network(), cells([6], [3])
    changed = tokens._replace(gene_ids=tokens.gene_ids.clone().index_fill(0, torch.tensor([4, 5]), 7))
    assert torch.allclose(model(tokens).cell, model(changed).cell, atol=1e-12)
    assert not torch.allclose(model(tokens).states[4], model(changed).states[4])


def test_the_value_of_an_asked_token_is_not_read() -> None:
    model, tokens = network(), cells([6], [3])
    changed = tokens._replace(values=tokens.values.clone().index_fill(0, torch.tensor([3, 4, 5]), 9.0))
    assert torch.equal(model(tokens).states, model(changed).states)


def test_a_given_cell_replaces_cls() -> None:
    model, tokens = network(), cells([4, 5])
    given = tokens._replace(cell=torch.randn(2, 16, dtype=torch.float64))
    changed = given._replace(values=given.values.clone().index_fill(0, given.offsets[:-1], 3.0))
    assert torch.equal(model(given).states, model(changed).states)
    assert not torch.allclose(model(given).cell, model(tokens).cell)


def test_values_are_looked_up_as_they_are_computed() -> None:
    encoder = ValueEncoder(8).double()
    whole = torch.arange(200).remainder(53).double() - 2
    looked_up = encoder(whole)
    assert torch.allclose(looked_up, encoder._embed(whole), atol=1e-12)
    assert torch.allclose(encoder(whole + 0.5), encoder._embed(whole + 0.5), atol=1e-12)
    assert torch.equal(encoder(torch.tensor([600.0], dtype=torch.float64)), encoder(torch.tensor([512.0], dtype=torch.float64)))
    gradients = [torch.autograd.grad(out.square().sum(), list(encoder.parameters())) for out in (encoder(whole), encoder._embed(whole))]
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_flags_and_dose_move_only_their_token() -> None:
    model = network(n_flags=3, dose=True, n_layers=1)
    tokens = cells([4, 4])
    flags = torch.tensor([0, 1, 0, 0, 0, 0, 0, 0])
    x = [model._embed(model.gene_embedding(t.gene_ids), t, None) for t in (tokens, tokens._replace(flags=flags, dose=flags.double()))]
    moved = (x[0] - x[1]).abs().amax(1) > 1e-9
    assert moved.tolist() == [False, True, *[False] * 6]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"flags": torch.zeros(4, dtype=torch.long)}, "flags"),
        ({"dose": torch.zeros(4)}, "dose"),
        ({"modality": torch.zeros(4, dtype=torch.long)}, "modality"),
    ],
)
def test_refuses_what_it_has_no_tensors_for(fields: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        network()(cells([4], **fields))


def test_refuses_to_be_asked_when_not_generative() -> None:
    with pytest.raises(ValueError, match="generative"):
        network(generative=False)(cells([4], [2]))


def test_domain_norm_equals_one_batchnorm_per_domain() -> None:
    torch.manual_seed(0)
    ours = DomainNorm(6, 4).double()
    theirs = [nn.BatchNorm1d(6, eps=EPS_INPUT_NORM, affine=False).double() for _ in range(4)]
    for _ in range(3):
        x = torch.randn(41, 6, dtype=torch.float64, requires_grad=True)
        domain = torch.randint(0, 3, (41,))
        domain[7] = 3  # a domain with one token: passed through its running statistics
        upstream = torch.randn_like(x)
        out = ours(x, domain)
        expected = torch.zeros_like(x)
        for d in range(4):
            theirs[d].train(d != 3)
            expected = expected.index_copy(0, (domain == d).nonzero()[:, 0], theirs[d](x[domain == d]))
        assert float((out - expected).detach().abs().max()) < 1e-12
        (have,), (want,) = (torch.autograd.grad(y, x, upstream, retain_graph=True) for y in (out, expected))
        assert float((have - want).abs().max()) < 1e-12
    for d in range(3):
        assert torch.allclose(ours.running_mean[d], theirs[d].running_mean)  # type: ignore[arg-type]
        assert torch.allclose(ours.running_var[d], theirs[d].running_var)  # type: ignore[arg-type]
    assert ours.num_batches_tracked.tolist() == [3, 3, 3, 0]
    ours.eval()
    assert torch.isfinite(ours(torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3]))).all()


def test_context_stays_out_of_the_transformer() -> None:
    model = network(n_batches=3, batch_context=True)
    tokens = cells([4, 5], labels={"batch": torch.tensor([0, 2])})
    other = tokens._replace(labels={"batch": torch.tensor([1, 1])})
    assert torch.equal(model(tokens).states, model(other).states)
    assert not torch.equal(model(tokens).context, model(other).context)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch"):
        model(tokens._replace(labels={}))


def test_config_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="multiple of n_heads"):
        ModelConfig(vocab_size=5, width=10, n_heads=4)
    with pytest.raises(ValueError, match="n_batches"):
        ModelConfig(vocab_size=5, input_norm="domain")
