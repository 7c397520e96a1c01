"""What a pretraining run would take, said before anything starts: parameters, memory, time, cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, NamedTuple

import psutil
import torch

from annformer.data.source import CellSource
from annformer.data.store import StoreSource
from annformer.durations import in_words
from annformer.scgpt import ScGPT
from annformer.train.config import Machine, PretrainConfig
from annformer.train.datamodule import CellDataModule, turns_of
from annformer.train.fit import require_machine
from annformer.train.flops import PEAK_FLOPS, batch_flops, peak_flops
from annformer.train.pretrain import device_of, new_model, prepare_data
from annformer.train.strategy import require_same_norm

BYTES_PER_PARAMETER: Final = 16
"""Weight, gradient and the two moments of AdamW, in float32."""
FORWARD_SHARE: Final = 1 / 3
"""Of the work of a training step, what comes before the gradients."""
BYTES_PER_UNIT: Final = 200
"""Of a token, for each layer and unit of width: about what a turn keeps for its gradients. Only bounds what is measured."""
_STEPS: Final = 3
_GPUS: Final = ("NVIDIA A100", "NVIDIA H100", "NVIDIA H200")
_EXPECTED_MFU: Final = 0.4
"""Share of a GPU's peak that a well-fed run of this kind reaches; nothing of it was measured here."""


@dataclass(frozen=True)
class Estimate:
    """Numbers of a run; seconds and bytes are those of one device that made a few real steps."""

    n_parameters: int
    n_gene_parameters: int
    n_cells: int
    n_held_out: int
    tokens_per_epoch: int
    steps_per_epoch: int
    n_steps: int
    turns: int
    """Forward and backward passes of one device in a step."""
    flops_per_epoch: float
    device: str
    seconds_per_epoch: float
    """On all that the run has, if they share the work evenly; reading and tokenizing included."""
    validation_seconds: float
    """All looks at held-out cells together."""
    mfu: float
    working_bytes: int
    """Activations and whatever else a turn takes beyond the parameters' own."""
    free_bytes: int
    """Memory that the device had left before anything was measured."""
    n_devices: int
    n_apart: int
    """Devices that compute at the same time: GPUs, or the nodes of a run on CPUs, where the processes of a node share its cores."""
    price_per_hour: float | None
    epochs: float

    def lines(self) -> list[str]:
        """Say it."""
        whole = self.seconds_per_epoch * self.epochs + self.validation_seconds
        turns = f"{self.turns} turn{'s' * (self.turns > 1)} of each device in a step"
        operations = f"{self.flops_per_epoch:.3g} floating point operations"
        state = _gigabytes(self.n_parameters * BYTES_PER_PARAMETER)
        where = f"{self.n_devices} x {self.device} (measured: {_STEPS} steps, MFU {self.mfu:.0%})"
        shared = self.n_apart < self.n_devices
        if shared:
            where += f", the processes of a node sharing its cores: as fast as {self.n_apart}"
        lines = [
            f"network        {self.n_parameters:,} parameters, {self.n_gene_parameters:,} of them rows of genes",
            f"cells          {self.n_cells:,} to train on, {self.n_held_out:,} held out",
            f"an epoch       {self.tokens_per_epoch:,} tokens in {self.steps_per_epoch:,} steps; {operations}",
            f"the run        {self.epochs:g} epochs, {self.n_steps:,} steps, {turns}",
            f"memory         {state} for parameters and optimizer, about {_gigabytes(self.working_bytes)} for a turn, per device",
            f"checkpoint     {_gigabytes(self.n_parameters * 12)} on disk",
            f"time           {in_words(self.seconds_per_epoch)} an epoch, {in_words(whole)} in all with validations, on {where}",
        ]
        if (needed := self.n_parameters * BYTES_PER_PARAMETER + self.working_bytes) > self.free_bytes:
            found = f"{_gigabytes(needed)} are more than this device has free ({_gigabytes(self.free_bytes)})"
            lines.append(f"               {found}: lower train.tokens_per_forward")
        if self.price_per_hour is not None:
            per_epoch, in_all = (seconds / 3600 * self.price_per_hour * self.n_apart for seconds in (self.seconds_per_epoch, whole))
            rate = f"at {self.price_per_hour:g} per {'node' if shared else 'device'} and hour"
            lines.append(f"cost           {per_epoch:,.2f} an epoch, {in_all:,.2f} in all, {rate}")
        lines += ["by arithmetic, not measured:"]
        for gpu in _GPUS:
            seconds = self.flops_per_epoch / (PEAK_FLOPS[gpu]["bf16"] * _EXPECTED_MFU)
            lines.append(f"  one {gpu:<12} {in_words(seconds)} an epoch in bf16, at {_EXPECTED_MFU:.0%} of its peak")
        return lines


def estimate(source: CellSource, config: PretrainConfig, machine: Machine, *, price_per_hour: float | None = None) -> Estimate:
    """Plan a run and measure a few of its steps on one device.

    Raises
    ------
    InputError
        When `machine` asks for a GPU and there is none, for several devices where the network can only be trained by one process, or for
        more devices than a step has cells for.
    """
    require_machine(machine)
    assert isinstance(source, StoreSource), "estimates are made for stores"
    require_same_norm(machine, config.network(source.vocab))
    device = device_of(machine)
    free = free_bytes(device)
    data = prepare_data(source, source.vocab, config)
    model = new_model(data.vocab, config).to(device)
    of_node = torch.cuda.device_count() if device.type == "cuda" else 1
    n_devices = machine.nodes * (of_node if machine.devices == "auto" else machine.devices)
    n_apart = n_devices if device.type == "cuda" else machine.nodes
    data.require_cells(n_devices)
    found = measure(model, data, device, n_devices)
    plan = data.plan
    whole_epoch = min(plan.steps_per_epoch, plan.n_steps)
    tokens_per_epoch = round(plan.tokens_until(whole_epoch) * plan.steps_per_epoch / whole_epoch)
    return Estimate(
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        n_gene_parameters=model.encoder.gene.weight.numel(),
        n_cells=len(data.training_rows),
        n_held_out=len(data.validation_rows),
        tokens_per_epoch=tokens_per_epoch,
        steps_per_epoch=plan.steps_per_epoch,
        n_steps=plan.n_steps,
        turns=turns_of(config.train, n_devices),
        flops_per_epoch=found.flops / found.n_tokens * tokens_per_epoch,
        device=torch.cuda.get_device_name() if device.type == "cuda" else _threads(torch.get_num_threads()),
        seconds_per_epoch=found.seconds_of(tokens_per_epoch) / n_apart,
        validation_seconds=found.seconds / found.n_tokens * forward_tokens(data) * FORWARD_SHARE / n_apart,
        mfu=found.flops / found.seconds / peak_flops(device, config.train.precision),
        working_bytes=found.working_bytes,
        free_bytes=free,
        n_devices=n_devices,
        n_apart=n_apart,
        price_per_hour=price_per_hour,
        epochs=config.train.epochs,
    )


class Measured(NamedTuple):
    """A few turns of one device, after one that warms up."""

    seconds: float
    """From batches to new weights."""
    loading_seconds: float
    """What reading and tokenizing the batches adds to that: nothing where loading processes keep up."""
    working_bytes: int
    """What a whole turn takes beyond the parameters' own."""
    flops: float
    n_tokens: int

    def seconds_of(self, n_tokens: int) -> float:
        """Time for so many tokens."""
        return (self.seconds + self.loading_seconds) / self.n_tokens * n_tokens


def measure(model: ScGPT, data: CellDataModule, device: torch.device, world: int) -> Measured:
    """Make a few turns of one device, of no more cells than surely find room."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    dtype = {"32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[data.config.precision]
    config = model.config.model
    most_tokens = free_bytes(device) // 4 // (BYTES_PER_UNIT * config.width * config.n_layers)
    seconds, loading, flops, n_tokens, working = 0.0, 0.0, 0.0, 0, 0.0
    before = _bytes(device)
    own = 12 * sum(parameter.numel() for parameter in model.parameters())  # gradients and moments, which come during the first step
    for step in range(1 + _STEPS):
        asked = time.perf_counter()
        batch, n_whole = data.some_of(min(step, data.n_steps - 1), world, most_tokens)
        began = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            losses = model.losses(batch.to(device))
        torch.stack([loss.mean for loss in losses.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step:
            seconds += time.perf_counter() - began
            loading += began - asked
            flops += batch_flops(model, batch)
            n_tokens += batch.n_tokens
        working = max(working, (_bytes(device) - before - own) / batch.n_tokens * n_whole)
    if data.config.workers:  # which read while the network learns: what counts is the slower of the two
        loading = max(0.0, loading / data.config.workers - seconds)
    return Measured(seconds, loading, max(0, round(working)), flops, n_tokens)


def forward_tokens(data: CellDataModule) -> int:
    """Tokens of all looks at held-out cells, before the run and during it."""
    n_shares = len(data.config.asked_shares) if data.config.mode != "none" else 1
    n_looks = data.config.validations + 1 if data.config.validations else 0
    return n_looks * n_shares * int(data.n_tokens[data.validated_rows].sum())


def free_bytes(device: torch.device) -> int:
    """Memory that is left."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss


def _threads(n: int) -> str:
    return f"process of {n} CPU thread{'s' * (n > 1)}"


def _gigabytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.0f} MB"
