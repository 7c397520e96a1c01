"""What an objective is, and the small pieces that several of them use."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from annformer.config import Config
from annformer.model.config import ModelConfig
from annformer.tokens import Encoded, TokenBatch

Encode = Callable[[TokenBatch], Encoded]


class Loss(NamedTuple):
    """A loss as sum and count, so that ranks and micro-batches with unequal counts average to what one process would get."""

    total: Float[Tensor, ""]
    n: Float[Tensor, ""]
    """What `total` is a sum over; named so because a tuple's `count` is taken."""

    @property
    def mean(self) -> Float[Tensor, ""]:
        """Loss per counted item; 0 when nothing was asked, so that an empty batch does not turn weights into NaN."""
        return self.total / self.n.clamp(min=1)


class Prediction(NamedTuple):
    """Predicted expression at the rows that were encoded."""

    value: Float[Tensor, "row"]
    """Expected value (a bin, or an expression level)."""
    nonzero_logit: Float[Tensor, "row"] | None = None
    """Logit of the probability that the value is not zero."""
    bin_logits: Float[Tensor, "row bin"] | None = None
    """Logits over the bins, where the objective is a cross entropy over bins."""


class ObjectiveConfig(Config):
    """Settings that every objective has."""

    weight: float = Field(1.0, ge=0)
    """Factor of this objective's losses in the sum that training minimises."""


class Objective(nn.Module):
    """One loss with its own head. Sees only `Encoded`, `TokenBatch` and a function that encodes another batch.

    A subclass says `config_class`, builds its head from (config, model_config), and answers `losses`.
    """

    def __init__(self, config: ObjectiveConfig, model: ModelConfig) -> None:  # noqa: ARG002  # the signature every objective has
        super().__init__()
        self.weight = config.weight

    def losses(self, encoded: Encoded, tokens: TokenBatch, encode: Encode) -> dict[str, Loss]:
        """Named losses of a batch, unweighted; gradients flow to the head and the network."""
        raise NotImplementedError

    def counts(self, tokens: TokenBatch) -> dict[str, Int[Tensor, ""]]:
        """`Loss.n` of every loss, known before anything is encoded.

        Training divides by the count over all micro-batches and ranks of a step, and so has to know it before the first backward pass.
        """
        raise NotImplementedError


def take(x: Tensor, rows: Int[Tensor, "row"] | None) -> Tensor:
    """`x` at `rows`, or all of it."""
    return x if rows is None else x[rows]


def state_and_context(encoded: Encoded) -> Float[Tensor, "row head_width"]:
    """What an expression head reads: the state, beside it the batch and modality context where the model has one."""
    if encoded.context is None:
        return encoded.states
    return torch.cat((encoded.states, take(encoded.context, encoded.rows)), -1)


def expression_head(width: int, hidden: int, out: int = 1) -> nn.Sequential:
    """Three linear layers with LeakyReLU between (scGPT `ExprDecoder`)."""
    return nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU(), nn.Linear(hidden, out))


def classifier_head(width: int, n_layers: int, activation: type[nn.Module]) -> nn.Sequential:
    """`n_layers - 1` times linear, activation, LayerNorm (scGPT `ClsDecoder`, `AdversarialDiscriminator`, but the last layer)."""
    return nn.Sequential(*(module for _ in range(n_layers - 1) for module in (nn.Linear(width, width), activation(), nn.LayerNorm(width))))


def asked_of(encoded: Encoded, tokens: TokenBatch) -> tuple[Float[Tensor, "row"], Bool[Tensor, "row"]]:
    """Targets at the encoded rows (0 where there is none), and where there is one."""
    if tokens.targets is None:
        msg = "this objective needs targets: use masking.ask or masking.hide_values first"
        raise ValueError(msg)
    target = take(tokens.targets, encoded.rows)
    asked = torch.isfinite(target)
    return torch.where(asked, target, 0), asked


def expression_counts(tokens: TokenBatch, *names: str, zero_probability: bool) -> dict[str, Int[Tensor, ""]]:
    """Count the asked genes, for every loss that `expression_losses` names."""
    if tokens.targets is None:
        return {}
    n = torch.isfinite(tokens.targets).sum()
    return {f"{name}{end}": n for name in names for end in ("", *(["_nonzero"] if zero_probability else []))}


def expression_losses(prediction: Prediction, encoded: Encoded, tokens: TokenBatch, name: str) -> dict[str, Loss]:
    """Squared error on the value (or cross entropy over bins), and the Bernoulli loss of being zero where the head predicts it."""
    target, asked = asked_of(encoded, tokens)
    count = asked.sum()
    if prediction.bin_logits is not None:
        each = F.cross_entropy(
            prediction.bin_logits.to(target.dtype), target.long().clamp(0, prediction.bin_logits.shape[-1] - 1), reduction="none"
        )
    else:
        each = (prediction.value.to(target.dtype) - target) ** 2
    losses = {name: Loss((each * asked).sum(), count)}
    if prediction.nonzero_logit is not None:
        bernoulli = F.binary_cross_entropy_with_logits(
            prediction.nonzero_logit, (target > 0).to(prediction.nonzero_logit), reduction="none"
        )
        losses[f"{name}_nonzero"] = Loss((bernoulli * asked).sum(), count)
    return losses


def label_count(tokens: TokenBatch, label: str) -> Int[Tensor, ""]:
    """Count the cells that have the label."""
    return (_codes(tokens, label) >= 0).sum()


def label_loss(
    logits: Float[Tensor, "cell class"], tokens: TokenBatch, label: str, class_weights: Float[Tensor, "class"] | None = None
) -> Loss:
    """Cross entropy of a cell label; cells with a negative code have no label and do not count."""
    codes = _codes(tokens, label)
    weights = None if class_weights is None else class_weights.to(logits)
    return Loss(F.cross_entropy(logits, codes.clamp(min=-1), weights, ignore_index=-1, reduction="sum"), (codes >= 0).sum())


def _codes(tokens: TokenBatch, label: str) -> Int[Tensor, "cell"]:
    if label not in tokens.labels:
        msg = f"this objective needs labels[{label!r}]; the batch carries {sorted(tokens.labels)}"
        raise ValueError(msg)
    return tokens.labels[label]
