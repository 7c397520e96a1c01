"""TrainingPlan: what one step does; adds and logs the losses that the model names."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from annformer.scgpt import ScGPT
from annformer.tokens import TokenBatch
from annformer.train.config import TrainConfig


class TrainingPlan(L.LightningModule):
    """Fit a model by the weighted sum of the mean losses of its objectives.

    All randomness of a step is seeded by (seed, step), so that no state of a generator is part of the training state.

    Parameters
    ----------
    model
        Trained in place.
    n_steps
        Length of the run, which the schedule of the learning rate needs.
    """

    def __init__(self, model: ScGPT, config: TrainConfig, n_steps: int) -> None:
        super().__init__()
        self.model, self.config, self.n_steps = model, config, n_steps

    def training_step(self, tokens: TokenBatch, _step: int) -> Tensor:
        """Return the loss of a batch and log its parts."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_mixed(self.config.seed, self.global_step))
            return self._losses(tokens, "train")

    def validation_step(self, tokens: TokenBatch, _step: int) -> None:
        """Log the losses on held-out cells, averaged over asked genes."""
        self._losses(tokens, "validation")

    def configure_optimizers(self) -> Any:
        """Build fused AdamW; decay on matrices only; warm-up, then half a cosine."""
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self.config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate_share(self, step: int) -> float:
        """Learning rate of a step as a share of the highest."""
        warmup = max(1, round(self.config.warmup_share * self.n_steps))
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, self.n_steps - 1 - warmup))
        return self.config.last_rate_share + (1 - self.config.last_rate_share) * 0.5 * (1 + math.cos(math.pi * done))

    def _losses(self, tokens: TokenBatch, stage: str) -> Tensor:
        total = torch.zeros((), device=self.device)
        for name, loss in self.model.losses(tokens).items():
            total = total + self._weight(name) * loss.mean
            self.log(f"{stage}/{name}", loss.mean.detach(), batch_size=max(1, int(loss.n)))
        self.log(f"{stage}/loss", total.detach(), batch_size=tokens.n_cells)
        return total

    def _weight(self, loss: str) -> float:
        """Weight of the objective that the loss belongs to."""
        return next(config.weight for config in self.model.config.objectives.values() if f"{loss}_".startswith(f"{config.kind}_"))


def _mixed(seed: int, step: int) -> int:
    """One seed from two numbers, far apart for neighbouring steps."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD6E8FEB86659FD93 + 1) % 2**63
