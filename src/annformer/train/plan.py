"""TrainingPlan: what one step does to the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypedDict

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from annformer.errors import input_error
from annformer.objectives import Objective
from annformer.scgpt import ScGPT
from annformer.tokens import TokenBatch
from annformer.train.config import TrainConfig
from annformer.train.datamodule import CellDataModule
from annformer.train.offenders import cells_without_finite_loss
from annformer.train.ranks import of_all_ranks, stop_all
from annformer.train.strategy import is_sharded, shard

Step = tuple[int, Sequence[TokenBatch]]
"""Number of a step, and this process's part of its cells in as many turns as its memory asks for."""


class StepResult(NamedTuple):
    """What is known after a step, equal on all ranks."""

    losses: dict[str, float]
    """Mean losses by name over all cells of the step; `loss` is their weighted sum, which was minimised."""
    n_cells: int
    n_tokens: int
    stop: bool
    """Some process wants the run to end here."""
    checkpoint: bool
    """Some process wants a checkpoint here."""


class Best(TypedDict):
    """The validation with the lowest loss."""

    loss: float
    step: int
    n_in_vain: int
    """Validations since."""
    weights: dict[str, Tensor]


class TrainingPlan(L.LightningModule):
    """Fit a model by the weighted sum of the mean losses of its objectives.

    A step may be cut into turns and spread over ranks; its gradient is the one that a single process would get from all its cells at once:
    every loss is divided by its count over all turns and ranks. What couples cells (ECS, CCE, DSBN) sees those of one turn, of all ranks
    together; so there turns matter, and ranks do not. All randomness of a step is seeded by (seed, step, rank, turn), so no state of a
    generator is part of the training state, and the learning rate is a function of the step.

    Parameters
    ----------
    model
        Trained in place.
    n_steps
        Length of the run, which the schedule of the learning rate needs.
    """

    def __init__(self, model: ScGPT, config: TrainConfig, n_steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.config, self.n_steps = model, config, n_steps
        self.wants_to_stop = False
        self.wants_checkpoint = False
        """Wishes of this process, set by a signal or the clock; they take effect at the end of a step, on all ranks together."""
        self.gradient_norm = math.nan
        """Length of the gradient of the last step, before clipping."""
        self.result: StepResult | None = None
        """Of the last step."""
        self.best: Best | None = None
        """The best validation yet, where `config.patience` asks for it."""

    def configure_model(self) -> None:
        """Cut the model into pieces over the ranks, where the strategy is FSDP2."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not is_sharded(self.model):
            assert self.device_mesh is not None, "the strategy has made one"
            shard(self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: Step, _index: int) -> None:
        """Update the weights once."""
        step, turns = batch
        optimizer = self.optimizers()
        assert isinstance(optimizer, L.pytorch.core.optimizer.LightningOptimizer), "there is one optimizer"
        for group in optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.rate_share(step)
        counts, extra = self._counts(turns)
        sums: dict[str, Tensor] = {}
        for number, tokens in enumerate(turns):
            with self._synchronised(last=number == len(turns) - 1), self._seeded(step, number):
                loss, totals = self._loss(tokens, counts)
                self.manual_backward(loss * self.trainer.world_size)
            for name, total in totals.items():
                sums[name] = sums.get(name, 0) + total
        self.result = self._result(sums, counts, extra)
        if not math.isfinite(self.result.losses["loss"]):
            raise stop_all(self._not_finite(step, turns))
        optimizer.step()
        optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip; here and not in the step, where fp16 gradients are not yet brought back to their size."""
        precision = self.trainer.precision_plugin
        if isinstance(precision, MixedPrecision) and precision.scaler is not None:
            precision.scaler.unscale_(optimizer)  # Lightning leaves it to fused optimizers, which do it only while they step
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.gradient_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(self.gradient_norm) and self.config.precision != "fp16":  # whose scaler skips the step by itself
            found = f"the gradient of step {self.global_step} is not finite, although its loss is"
            remedy = "lower train.learning_rate, or train in precision 32; the last checkpoint is intact"
            raise stop_all(input_error(found, "finite numbers", remedy))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Number the parameters in the optimizer's state as the model has them, and not by groups.

        FSDP2 writes and reads them so; everything else goes by their place in a group. So a checkpoint serves every strategy.
        """
        if self.best is not None:
            checkpoint["best"] = self.best
        if is_sharded(self.model):
            return
        (state,), (optimizer,) = checkpoint["optimizer_states"], self.trainer.optimizers
        place = {id(parameter): number for number, parameter in enumerate(self.parameters())}
        new = {
            old: place[id(parameter)]
            for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
            for old, parameter in zip(saved["params"], group["params"], strict=True)
        }
        groups = [group | {"params": [new[old] for old in group["params"]]} for group in state["param_groups"]]
        checkpoint["optimizer_states"] = [{"state": {new[old]: values for old, values in state["state"].items()}, "param_groups": groups}]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the best validation of the run that is gone on with."""
        self.best = checkpoint.get("best")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build fused AdamW; decay on matrices only."""
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self.config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=self.config.betas, fused=True)

    def rate_share(self, step: int) -> float:
        """Learning rate of a step as a share of the highest: warm-up, then as the schedule says."""
        warmup = max(1, round(self.config.warmup_share * self.n_steps))
        if step < warmup:
            return (step + 1) / warmup
        if self.config.schedule == "epochs":
            return self.config.epoch_decay ** int(step * self.config.epochs / self.n_steps)
        done = min(1.0, (step - warmup) / max(1, self.n_steps - 1 - warmup))
        return self.config.last_rate_share + (1 - self.config.last_rate_share) * 0.5 * (1 + math.cos(math.pi * done))

    def judge(self, losses: dict[str, float], step: int) -> None:
        """Keep the weights if no validation was better, and count the ones in vain."""
        value = sum(self.weight(name) * mean for name, mean in losses.items() if name not in ("loss", "dar"))
        if self.best is None or value < self.best["loss"]:
            weights = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
            self.best = {"loss": value, "step": step, "n_in_vain": 0, "weights": weights}
        else:
            self.best["n_in_vain"] += 1

    @property
    def lost_patience(self) -> bool:
        """Whether as many validations in vain have come as the settings bear."""
        return self.best is not None and self.config.patience is not None and self.best["n_in_vain"] >= self.config.patience

    @torch.no_grad()
    def mean_losses(self, batches: Sequence[TokenBatch]) -> dict[str, float]:
        """Mean losses over batches, those of all ranks together; every rank gives equally many batches."""
        was_training = self.model.training
        self.model.eval()
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for tokens in batches:
            with self.trainer.precision_plugin.forward_context():
                losses = self.model.losses(tokens.to(self.device))
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.total.double()
                counts[name] = counts.get(name, 0) + loss.n.double()
        self.model.train(was_training)
        names = sorted(sums)
        both = self._over_ranks(torch.stack([sums[name] for name in names] + [counts[name] for name in names])).tolist()
        means = {name: total / max(1.0, n) for name, total, n in zip(names, both[: len(names)], both[len(names) :], strict=True)}
        return means | {"loss": sum(self.weight(name) * mean for name, mean in means.items())}

    def weight(self, loss: str) -> float:
        """Weight of the objective that the loss belongs to."""
        return next(config.weight for config in self.model.config.objectives.values() if f"{loss}_".startswith(f"{config.kind}_"))

    def _loss(self, tokens: TokenBatch, counts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the weighted mean loss that comes from these cells, and the sums it is made of."""
        losses = self.model.losses(tokens)
        assert losses.keys() == counts.keys(), f"an objective counts {sorted(counts)} and has the losses {sorted(losses)}"
        parts = [self.weight(name) * loss.total / counts[name].clamp(min=1) for name, loss in losses.items()]
        if self.model.encoder.asked is not None:  # DDP and FSDP2 need its gradient from every rank, also from one where no gene is asked
            parts.append(0 * self.model.encoder.asked.sum())
        return torch.stack(parts).sum(), {name: loss.total.detach().double() for name, loss in losses.items()}

    def _counts(self, turns: Sequence[TokenBatch]) -> tuple[dict[str, Tensor], Float[Tensor, "4"]]:
        """What each loss is divided by; and cells, tokens, and how many processes want to stop or save: one message for all of it."""
        counts: dict[str, Tensor] = {}
        for tokens in turns:
            for objective in self.model.objectives.values():
                assert isinstance(objective, Objective)
                for name, n in objective.counts(tokens).items():
                    counts[name] = counts.get(name, 0) + n.double()
        own = [
            sum(tokens.n_cells for tokens in turns),
            sum(tokens.n_tokens for tokens in turns),
            int(self.wants_to_stop),
            int(self.wants_checkpoint),
        ]
        extra = torch.tensor(own, dtype=torch.float64, device=self.device)
        names = sorted(counts)
        summed = self._over_ranks(torch.cat((torch.stack([counts[name] for name in names]), extra)))
        return dict(zip(names, summed[:-4], strict=True)), summed[-4:]

    def _result(self, sums: dict[str, Tensor], counts: dict[str, Tensor], extra: Tensor) -> StepResult:
        names = sorted(sums)
        totals = self._over_ranks(torch.stack([sums[name] for name in names]))
        means = (totals / torch.stack([counts[name] for name in names]).clamp(min=1)).tolist()
        losses = dict(zip(names, means, strict=True))
        n_cells, n_tokens, stop, checkpoint = extra.tolist()
        total = sum(self.weight(name) * mean for name, mean in losses.items())
        return StepResult(losses | {"loss": total}, int(n_cells), int(n_tokens), stop > 0, checkpoint > 0)

    def _over_ranks(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def _synchronised(self, *, last: bool) -> Any:
        """Ranks exchange gradients after the last turn of a step only."""
        strategy = self.trainer.strategy
        return nullcontext() if last or not hasattr(strategy, "block_backward_sync") else strategy.block_backward_sync()

    @contextmanager
    def _seeded(self, step: int, turn: int) -> Iterator[None]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_mixed(self.config.seed, step, self.global_rank, turn))
            yield

    def _not_finite(self, step: int, turns: Sequence[TokenBatch]) -> Exception:
        """Build the message, the same on all ranks."""
        names = [name for part in of_all_ranks(self._offenders(step, turns)) for name in part]
        losses = {name: value for name, value in self.result.losses.items() if not math.isfinite(value)} if self.result else {}
        found = f"the loss of step {step} is not finite ({', '.join(f'{name} {value}' for name, value in losses.items())})"
        if names:
            found += f"; the cells are {', '.join(names[:10])}" + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        else:
            found += "; each cell alone gives a finite one"
        all_of_them = len(names) == self.result.n_cells if self.result else False
        blame = "lower train.learning_rate: where it is all cells, it is the weights"
        what = blame if all_of_them else "look at these cells"
        remedy = f"{what}, or train in precision 32 or with another train.learning_rate; what was saved before is intact"
        return input_error(found, "finite losses", remedy)

    def _offenders(self, step: int, turns: Sequence[TokenBatch]) -> list[str]:
        """Names of this process's cells whose losses are not finite; all ranks encode equally often, which FSDP2 needs."""
        data: CellDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        found = []
        for turn, tokens in enumerate(turns):
            n = max(of_all_ranks(tokens.n_cells))
            with self.trainer.precision_plugin.forward_context():
                bad = cells_without_finite_loss(self.model, tokens, n)
            found += [data.names_of(step, self.global_rank, self.trainer.world_size, turn)[cell] for cell in bad]
        return found


def _mixed(*numbers: int) -> int:
    """One seed from several numbers, far apart for neighbouring ones."""
    seed = 1
    for number in numbers:
        seed = (seed * 0x9E3779B97F4A7C15 + number * 0xD6E8FEB86659FD93 + 1) % 2**63
    return seed
