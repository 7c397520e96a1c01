"""Each objective against its formula, and what all of them promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from annformer.model import CellEncoder, ModelConfig
from annformer.objectives import OBJECTIVES, build
from annformer.objectives.affine import AffineConfig
from annformer.objectives.anchor import Anchor, AnchorConfig
from annformer.objectives.cce import CCEConfig
from annformer.objectives.cls import CLSConfig
from annformer.objectives.dar import DARConfig
from annformer.objectives.ecs import ECSConfig
from annformer.objectives.gep import GEPConfig
from annformer.objectives.gepc import GEPCConfig
from annformer.objectives.protocol import Loss
from annformer.tokens import Encoded, TokenBatch

CONFIGS = {
    "gep": GEPConfig(zero_probability=True, cell_prompt=True),
    "gepc": GEPCConfig(zero_probability=True),
    "ecs": ECSConfig(),
    "cls": CLSConfig(n_classes=3),
    "dar": DARConfig(n_batches=2),
    "cce": CCEConfig(),
    "affine": AffineConfig(zero_probability=True, adaptive_bias=True),
    "anchor": AnchorConfig(n_components=5),
}


def tokens_and_model(**changes: object) -> tuple[TokenBatch, CellEncoder, ModelConfig]:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=30, width=12, n_heads=3, n_layers=1, ff_width=12, dropout=0.0).with_(**changes)
    offsets = torch.tensor([0, 5, 9, 15, 21])
    targets = torch.full((21,), torch.nan, dtype=torch.float64)
    asked = torch.tensor([3, 4, 8, 13, 14, 20])
    targets[asked] = torch.tensor([1.0, 0.0, 7.0, 50.0, 3.0, 0.0], dtype=torch.float64)
    values = torch.randint(1, 51, (21,)).double()
    values[offsets[:-1]] = -2
    labels = {"batch": torch.tensor([0, 1, 1, 0]), "cell_type": torch.tensor([2, 0, -1, 1])}
    batch = TokenBatch(torch.randint(0, 30, (21,)), values, None, None, offsets, torch.tensor([3, 3, 4, 5]), targets, None, labels, None)
    return batch.check(), CellEncoder(config).double().train(), config


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("context", [False, True])
def test_every_objective_gives_finite_losses_and_trains_its_head(name: str, context: bool) -> None:
    tokens, encoder, config = tokens_and_model(**({"n_batches": 2, "batch_context": True} if context else {}))
    objective = build(CONFIGS[name], config).double()
    if isinstance(objective, Anchor):
        objective.place(torch.randn(4, 5))
        tokens = tokens._replace(labels=tokens.labels | {"row": torch.arange(4)})
    losses = objective.losses(encoder(tokens, "targets"), tokens, lambda t: encoder(t, "targets"))
    total = sum((loss.mean for loss in losses.values()), torch.zeros(()))
    total.backward()
    assert torch.isfinite(total)
    assert all(set(losses) and key.startswith(name) for key in losses)
    never_read = {"bias_nonzero"}  # the original's dead head
    for key, parameter in objective.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) or key.split(".")[0] in never_read, key
    assert encoder.gene.weight.grad is not None


@pytest.mark.parametrize("name", ["gep", "gepc", "affine"])
def test_losses_do_not_depend_on_leaving_out_rows(name: str) -> None:
    tokens, encoder, config = tokens_and_model()
    objective = build(CONFIGS[name], config).double()
    results = [objective.losses(encoder(tokens, w), tokens, lambda t: encoder(t, "targets")) for w in ("all", "targets")]
    assert results[0].keys() == results[1].keys()
    for key, loss in results[0].items():
        assert torch.allclose(loss.mean, results[1][key].mean)
        assert int(loss.n) == 6


def test_gep_is_a_mean_over_asked_tokens() -> None:
    tokens, encoder, config = tokens_and_model()
    objective = build(GEPConfig(), config).double()
    encoded = encoder(tokens)
    asked = tokens.targets.isfinite()  # type: ignore[union-attr]
    expected = ((objective.predict(encoded).value - tokens.targets)[asked] ** 2).mean()  # type: ignore[operator]
    assert torch.allclose(objective.losses(encoded, tokens, encoder)["gep"].mean, expected)


def test_gep_cross_entropy_expects_the_mean_of_its_bins() -> None:
    tokens, encoder, config = tokens_and_model()
    objective = build(GEPConfig(loss="ce", n_bins=51), config).double()
    encoded = encoder(tokens, "targets")
    prediction = objective.predict(encoded)
    assert prediction.bin_logits is not None
    assert prediction.bin_logits.shape[-1] == 51
    by_hand = sum(b * p for b, p in enumerate(prediction.bin_logits.softmax(-1).T))
    assert torch.allclose(prediction.value, by_hand)
    asked = tokens.targets.isfinite()  # type: ignore[union-attr]
    full = objective.predict(encoder(tokens)).bin_logits[asked]  # type: ignore[index]
    expected = F.cross_entropy(full, tokens.targets[asked].long())  # type: ignore[index]
    assert torch.allclose(objective.losses(encoded, tokens, encoder)["gep"].mean, expected)


def test_second_pass_sees_the_cell_but_does_not_train_it() -> None:
    tokens, encoder, config = tokens_and_model()
    objective = build(GEPConfig(cell_prompt=True), config).double()
    given = []
    objective.losses(encoder(tokens, "targets"), tokens, lambda t: (given.append(t.cell), encoder(t, "targets"))[1])
    assert len(given) == 1
    assert not given[0].requires_grad


def test_gepc_is_the_original_s_product() -> None:
    tokens, encoder, config = tokens_and_model()
    objective = build(GEPCConfig(zero_probability=True), config).double()
    encoded = encoder(tokens)
    query = torch.sigmoid(objective.query(encoded.genes))
    of = tokens.cell_of_token()
    prediction = objective.predict(encoded, tokens)
    assert torch.allclose(prediction.value, (objective.value(query) * encoded.cell[of]).sum(-1))
    assert torch.allclose(prediction.nonzero_logit, (objective.nonzero(query) * encoded.cell[of]).sum(-1))


def test_gepc_detached_leaves_gene_embeddings_alone() -> None:
    tokens, encoder, config = tokens_and_model()
    objective = build(GEPCConfig(detach_genes=True), config).double()
    encoded = encoder(tokens)._replace(cell=torch.randn(4, 12, dtype=torch.float64))
    objective.losses(encoded, tokens, encoder)["gepc"].mean.backward()
    assert encoder.gene.weight.grad is None


def test_affine_is_coefficient_times_input_plus_bias() -> None:
    tokens, encoder, config = tokens_and_model()
    encoded = encoder(tokens)
    for activation, adaptive in ((None, False), ("relu", True)):
        objective = build(AffineConfig(activation=activation, adaptive_bias=adaptive), config).double()
        coefficient, bias = objective.coefficient(encoded.states)[:, 0], objective.bias(encoded.states)[:, 0]
        if activation == "relu":
            coefficient, bias = coefficient.clamp(min=0), bias.clamp(min=0)
        first = tokens.values[1:5]
        expected = coefficient[:5] * tokens.values[:5] + bias[:5] * (first.mean() if adaptive else 1)
        assert torch.allclose(objective.predict(encoded, tokens).value[:5], expected)


def test_ecs_by_hand() -> None:
    tokens, _, config = tokens_and_model()
    cell = torch.randn(4, 12, dtype=torch.float64)
    encoded = Encoded(cell, None, cell, cell, None)
    unit = cell / cell.norm(dim=1, keepdim=True)

    def again(_: TokenBatch) -> Encoded:
        return encoded

    expected = sum(1 - (max(float(unit[i] @ unit[j]), 0) * (i != j) - 0.4) ** 2 for i in range(4) for j in range(4)) / 16
    assert float(build(ECSConfig(threshold=0.4), config).losses(encoded, tokens, again)["ecs"].mean) == pytest.approx(expected)


def test_cells_without_label_do_not_count() -> None:
    tokens, encoder, config = tokens_and_model()
    objective = build(CLSConfig(n_classes=3), config).double()
    encoded = encoder(tokens)
    loss = objective.losses(encoded, tokens, encoder)["cls"]
    known = torch.tensor([0, 1, 3])
    assert int(loss.n) == 3
    assert torch.allclose(loss.mean, F.cross_entropy(objective.predict(encoded)[known], tokens.labels["cell_type"][known]))
    with pytest.raises(ValueError, match="cell_type"):
        objective.losses(encoded, tokens._replace(labels={}), encoder)


def test_dar_reverses_the_gradient() -> None:
    tokens, encoder, config = tokens_and_model()
    objective = build(DARConfig(n_batches=2), config).double()
    cell = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    plain = F.cross_entropy(objective.out(objective.layers(cell)), tokens.labels["batch"])
    reversed_ = objective.losses(Encoded(cell, None, cell, cell, None), tokens, encoder)["dar"].mean
    assert torch.allclose(plain, reversed_)
    assert torch.allclose(torch.autograd.grad(plain, cell)[0], -torch.autograd.grad(reversed_, cell)[0])


def test_nothing_asked_is_no_loss_and_no_nan() -> None:
    tokens, encoder, config = tokens_and_model()
    nothing = tokens._replace(targets=torch.full_like(tokens.targets, torch.nan), n_visible=tokens.offsets.diff())  # type: ignore[arg-type]
    loss = build(GEPConfig(), config).double().losses(encoder(nothing), nothing, encoder)["gep"]
    assert float(loss.mean.detach()) == 0
    assert int(loss.n) == 0


def test_unequal_micro_batches_average_to_one() -> None:
    parts = [Loss(torch.tensor(6.0), torch.tensor(3)), Loss(torch.tensor(1.0), torch.tensor(1))]
    assert float(sum(p.total for p in parts) / sum(p.n for p in parts)) == float(Loss(torch.tensor(7.0), torch.tensor(4)).mean)
