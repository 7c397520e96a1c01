"""The counted work is the work: PyTorch's own counter finds the same; and the peak of a device is one."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import annformer as af
from annformer.masking import ask, hide_values
from annformer.model import attention
from annformer.objectives.gep import GEPConfig
from annformer.objectives.gepc import GEPCConfig
from annformer.scgpt import ModelFolderConfig
from annformer.tokens import TokenBatch
from annformer.train import flops
from annformer.train.flops import PEAK_FLOPS, batch_flops, peak_flops, step_flops


def cells(lengths: list[int]) -> TokenBatch:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    n = int(offsets[-1])
    ids = torch.cat([torch.cat((torch.tensor([0]), torch.randperm(299)[: length - 1] + 1)) for length in lengths])
    values = torch.randint(1, 51, (n,)).float()
    return TokenBatch(ids, values, None, None, offsets, offsets.diff(), None, None, {}, None)


def by_products(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, scale: float | None = None) -> Tensor:
    """Attention as the counter can see it; it does not know the CPU's kernel."""
    return (q @ k.transpose(-2, -1) * (scale or q.shape[-1] ** -0.5)).softmax(-1) @ v


@pytest.mark.parametrize("mode", ["ask", "hide"])
@pytest.mark.parametrize("cell_prompt", [False, True])
def test_as_torch_counts(mode: str, cell_prompt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", by_products)
    torch.manual_seed(0)
    network = {"vocab_size": 300, "width": 64, "n_heads": 1, "n_layers": 3, "ff_width": 96}
    objectives = {"gep": {"kind": "gep", "cell_prompt": cell_prompt}, "gepc": {"kind": "gepc"}}
    vocab = af.GeneVocab(["<cls>", *(f"G{i}" for i in range(299))])
    model = af.ScGPT(ModelFolderConfig.model_validate({"model": network, "objectives": objectives}), vocab).train()
    tokens = cells([220, 150, 90])
    tokens = ask(tokens, [0.5], seed=0) if mode == "ask" else hide_values(tokens, 0.3, seed=0)
    with FlopCounterMode(display=False) as counter:
        torch.stack([loss.mean for loss in model.losses(tokens).values()]).sum().backward()
    assert batch_flops(model, tokens) == pytest.approx(counter.get_total_flops(), rel=0.04)


def test_what_was_not_delivered_does_not_count() -> None:
    config = af.ModelConfig(vocab_size=100, width=32, n_heads=4, n_layers=4, ff_width=32)
    lengths, none = np.array([100, 60]), np.zeros(2, np.int64)
    embedding = step_flops(config, lengths, lengths, none, [], training=False)
    full_layer = 2 * (160 * 6 * 32**2 + 2 * 32 * (100**2 + 60**2))
    assert 3 * full_layer < embedding < 3.5 * full_layer  # of the last layer little more than keys and values
    asked = step_flops(config, lengths, lengths // 2, lengths - lengths // 2, [GEPConfig(), GEPCConfig()])
    assert asked < step_flops(config, lengths, lengths, lengths - 1, [GEPConfig(), GEPCConfig()])
    once, twice = (step_flops(config, lengths, lengths // 2, lengths // 2, [GEPConfig(cell_prompt=p)]) for p in (False, True))
    assert twice == 2 * once


def test_at_the_published_shape_as_by_hand() -> None:
    """218 MFLOP per token of 1,024 with full attention, the last layer and the head at every token (LIMITS by arithmetic)."""
    config = af.ModelConfig(vocab_size=60_697, width=512, n_heads=8, n_layers=12, ff_width=512)
    n = np.array([1024])
    per_token = step_flops(config, n, n, n - 1, []) / 1024
    assert per_token == pytest.approx((113 + 76) * 1e6, rel=0.02)


@pytest.mark.parametrize(
    ("name", "tflops"), [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362), ("NVIDIA A10G", 70)]
)
def test_peak_of_a_known_gpu(name: str, tflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), "bf16") == pytest.approx(tflops * 1e12)


def test_single_precision_may_be_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    peaks = PEAK_FLOPS["NVIDIA H200"]
    assert peak_flops(torch.device("cuda"), "32") == peaks["32"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(torch.device("cuda"), "32") == peaks["tf32"]


def test_peak_of_another_gpu_is_measured_once_by_large_products_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def reached(*how: object) -> float:
        asked.append(how)
        return 5e13

    monkeypatch.setattr(flops, "_reached", reached)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU 9")
    device = torch.device("cuda", 7)
    with caplog.at_level(logging.INFO, logger="annformer"):
        assert [peak_flops(device, "bf16") for _ in range(2)] == [5e13, 5e13]
    ((_, dtype, n, n_products),) = asked
    assert dtype == torch.bfloat16
    assert 2 * n**3 * n_products / 1e15 > 1e-3, "a GPU of 1,000 TFLOP/s is busy for a hundred times as long as a launch takes"
    assert len(caplog.messages) == 1
    assert "Some GPU 9" in caplog.messages[0]
    assert "50 TFLOP/s" in caplog.messages[0]


def test_rate_counts_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(times)))
    assert flops._reached(torch.device("cpu"), torch.float32, 16, 3) == 3 * 2 * 16**3


def test_peak_of_a_cpu_is_measured_once() -> None:
    peak = peak_flops(torch.device("cpu"), "32")
    assert 1e8 < peak < 1e14
    assert peak_flops(torch.device("cpu"), "32") == peak
