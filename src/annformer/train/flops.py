"""Floating-point work of a step, and what a device can do at most: the two sides of MFU, "model FLOP utilisation"."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from jaxtyping import Int

from annformer.model.config import ModelConfig
from annformer.objectives import AnyObjectiveConfig
from annformer.objectives.affine import AffineConfig
from annformer.objectives.cce import CCEConfig
from annformer.objectives.cls import CLSConfig
from annformer.objectives.dar import DARConfig
from annformer.objectives.gep import GEPConfig
from annformer.objectives.gepc import GEPCConfig
from annformer.scgpt import ScGPT
from annformer.tokens import TokenBatch
from annformer.train.config import Precision

log = logging.getLogger(__name__)


def _peaks(half: float, tf32: float, single: float) -> dict[str, float]:
    return {"bf16": half * 1e12, "fp16": half * 1e12, "tf32": tf32 * 1e12, "32": single * 1e12}


# From NVIDIA's data sheets (A100, H100, H200, L4, L40S, A10, V100, T4) and architecture papers (GA102, AD102), halved where a sheet counts
# sparse products; A10G from AWS's description of G5 instances. V100 and T4 have float16 only: their bf16 is that of float16.
PEAK_FLOPS: dict[str, dict[str, float]] = {
    "NVIDIA H200": _peaks(989.4, 494.7, 66.9),
    "NVIDIA H100 PCIe": _peaks(756.0, 378.0, 51.2),
    "NVIDIA H100 NVL": _peaks(835.5, 417.5, 60.0),
    "NVIDIA H100": _peaks(989.4, 494.7, 66.9),
    "NVIDIA A100": _peaks(312.0, 156.0, 19.5),
    "NVIDIA L40S": _peaks(362.0, 183.0, 91.6),
    "NVIDIA L4": _peaks(121.0, 60.0, 30.3),
    "NVIDIA A10G": _peaks(70.0, 35.0, 31.5),
    "NVIDIA A10": _peaks(125.0, 62.5, 31.2),
    "Tesla V100": _peaks(125.0, 15.7, 15.7),
    "Tesla T4": _peaks(65.0, 8.1, 8.1),
    "RTX 4090": _peaks(165.2, 82.6, 82.6),
    "RTX 3090": _peaks(71.0, 35.6, 35.6),
}
"""Dense products per second by words of a GPU's name, the first that fit: summed in float32; `tf32` where PyTorch is allowed to."""


def batch_flops(model: ScGPT, tokens: TokenBatch) -> int:
    """`step_flops` of training `model` on a batch."""
    lengths = tokens.offsets.diff()
    cell = tokens.cell_of_token()
    n_targets = torch.zeros_like(lengths)
    if tokens.targets is not None:
        n_targets.index_add_(0, cell, torch.isfinite(tokens.targets).long())
    a, b, c = (n.cpu().numpy() for n in (lengths, tokens.n_visible, n_targets))
    return step_flops(model.config.model, a, b, c, model.config.objectives.values())


def step_flops(
    config: ModelConfig,
    lengths: Int[np.ndarray, "cell"],
    n_visible: Int[np.ndarray, "cell"],
    n_targets: Int[np.ndarray, "cell"],
    objectives: Iterable[AnyObjectiveConfig],
    *,
    training: bool = True,
) -> int:
    """Floating-point operations that a step on these cells needs, two per multiplication and addition.

    Counted are matrix products only: linear layers; attention at (tokens x visible tokens of the cell + one own key per asked token); in
    the last layer keys and values of all tokens and everything else at `<cls>` and the tokens with a target; heads at these targets.
    Objectives that encode again (cell prompt, CCE) count again. Training counts three times: the backward pass has two products for each.
    Not counted: norms, dropout, embeddings and the value encoder (a table of bins would do), recomputation, padding, the optimizer.
    So cells, tokens and work that were not delivered cannot raise the MFU = step_flops / seconds / `peak_flops`.

    Parameters
    ----------
    lengths, n_visible, n_targets
        Tokens of each cell, `<cls>` included; those that others may attend to; those whose value is asked for.
    objectives
        Settings of the model's objectives; none for embedding cells.
    """
    lengths, n_visible, n_targets = (np.asarray(n, np.int64) for n in (lengths, n_visible, n_targets))
    chosen = list(objectives)
    passes = 1 + sum(isinstance(o, CCEConfig) or (isinstance(o, GEPConfig) and o.cell_prompt) for o in chosen)
    work = passes * _encoder(config, lengths, n_visible, n_targets)
    work += sum(_head(o, config, len(lengths), int(n_targets.sum())) for o in chosen)
    return 2 * work * (3 if training else 1)


def _encoder(config: ModelConfig, lengths: np.ndarray, n_visible: np.ndarray, n_targets: np.ndarray) -> int:
    """Multiplications of one forward pass."""
    width, n_tokens, rows = config.width, int(lengths.sum()), n_targets + 1
    mixing = width * (width + 2 * config.ff_width)  # what follows the attention
    n_pairs = int((lengths * n_visible + lengths - n_visible).sum())
    asked_rows = np.where(lengths > n_visible, n_targets, 0)
    n_last_pairs, n_rows = int((rows * n_visible + asked_rows).sum()), int(rows.sum())
    full = n_tokens * (3 * width**2 + mixing) + 2 * width * n_pairs
    last = n_tokens * 2 * width**2 + n_rows * (width**2 + mixing) + 2 * width * n_last_pairs
    return (config.n_layers - 1) * full + last


def _head(objective: AnyObjectiveConfig, config: ModelConfig, n_cells: int, n_targets: int) -> int:
    """Multiplications of one objective's head."""
    width, head_width = config.width, config.head_width
    match objective:
        case GEPConfig():
            one = width * (head_width + width + (objective.n_bins if objective.loss == "ce" else 1))
            zero = width * (head_width + width + 1) if objective.zero_probability else 0
            return n_targets * (one + zero) * (2 if objective.cell_prompt else 1)
        case GEPCConfig():
            query = head_width if objective.context_in_query else width
            n_products = 2 if objective.zero_probability else 1
            return n_targets * (query**2 + n_products * query) + n_cells * n_products * query * head_width
        case AffineConfig():
            return n_targets * 2 * width * (head_width + width + 1)
        case CLSConfig() | DARConfig():
            n_classes = objective.n_classes if isinstance(objective, CLSConfig) else objective.n_batches
            return n_cells * width * ((objective.n_layers - 1) * width + n_classes)
        case _:
            return n_cells**2 * width  # similarities of the cells of a batch


def peak_flops(device: torch.device, precision: Precision) -> float:
    """Floating-point operations per second that a device can do at most.

    Known GPUs by their data sheet, dense; anything else, CPUs with the present number of threads among it, by matrix products that are
    timed once per process: what this device reaches with them, which is less than a data sheet would say.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for known, peaks in PEAK_FLOPS.items():
        if re.search(rf"{known}\b", name):
            return peaks["tf32" if precision == "32" and torch.get_float32_matmul_precision() != "highest" else precision]
    return _measured(device, precision, torch.get_num_threads(), torch.get_float32_matmul_precision())


@cache
def _measured(device: torch.device, precision: Precision, n_threads: int, _tf32: str) -> float:
    """Take the time of large products once, and say so where a data sheet would have been better."""
    dtype = {"32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cpu":
        return _reached(device, dtype, 1024 if n_threads <= 4 else 2048, 1)
    peak = _reached(device, dtype, 8192, 2)
    name = torch.cuda.get_device_name(device)
    log.info("no data sheet is known for %s: MFU is a share of the %.3g TFLOP/s that large products reach on it", name, peak / 1e12)
    return peak


def _reached(device: torch.device, dtype: torch.dtype, n: int, n_products: int) -> float:
    """Operations per second in the best of a few rounds of n x n products, long enough that calls and launches do not count."""
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(n_products):
            product = a @ b
        product[0, 0].item()  # waits for all of them
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 * n_products / min(seconds)
