"""On a GPU: one flash call equals the boolean mask, forward and backward, on batches as they are trained on. Run by `make gpu-check`."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from annformer.model import CellEncoder, ModelConfig
from annformer.model.attention import Layout, attend
from annformer.tokens import TokenBatch

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}
"""Root of the mean squared difference as a share of that of the expected values; half precision has 8 and 11 bits."""
LAYOUTS = {
    "all visible": ([300, 1200, 1, 817], [300, 1200, 1, 817]),
    "some asked": ([300, 1200, 2, 817], [151, 300, 1, 205]),
    "only <cls> visible": ([400, 300], [1, 1]),
    "alike": ([1024] * 4, [512] * 4),
}


def batch(lengths: list[int], n_visible: list[int]) -> TokenBatch:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    n, visible = int(offsets[-1]), torch.tensor(n_visible)
    asked = torch.arange(n) - torch.repeat_interleave(offsets[:-1], offsets.diff()) >= torch.repeat_interleave(visible, offsets.diff())
    values = torch.randint(1, 51, (n,)).float()
    targets = torch.where(asked, values, torch.nan)
    return TokenBatch(torch.randint(0, 500, (n,)), values, None, None, offsets, visible, targets, None, {}, None).to("cuda")


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt().clamp(min=1e-6))


@pytest.mark.parametrize("depth", [32, 64])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention_equals_the_mask(name: str, dtype: torch.dtype, depth: int) -> None:
    torch.manual_seed(0)
    tokens = batch(*LAYOUTS[name])
    layout = Layout.of(tokens)
    q, k, v = (torch.randn(tokens.n_tokens, 4, depth, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, found = attend(*wide, layout, backend="reference"), attend(q, k, v, layout)
    assert found.dtype == dtype
    assert difference(found, expected) < TOLERANCE[dtype]
    upstream = torch.randn_like(expected)
    want, have = torch.autograd.grad(expected, wide, upstream), torch.autograd.grad(found, (q, k, v), upstream.to(dtype))
    assert all(difference(a, b) < 2 * TOLERANCE[dtype] for a, b in zip(have, want, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("wanted", ["all", "cell", "targets"])
def test_network_under_autocast_equals_that_of_a_cpu(name: str, wanted: Literal["all", "cell", "targets"]) -> None:
    torch.manual_seed(0)
    network = CellEncoder(ModelConfig(vocab_size=500, width=128, n_heads=2, n_layers=2, dropout=0.0))
    tokens = batch(*LAYOUTS[name])
    expected = network(tokens.to("cpu"), wanted)
    with torch.autocast("cuda", torch.bfloat16):
        found = network.cuda()(tokens, wanted)
    assert difference(found.states.cpu(), expected.states) < TOLERANCE[torch.bfloat16]
    assert (found.rows is None) == (expected.rows is None)
    assert found.rows is None or torch.equal(found.rows.cpu(), expected.rows)


def test_a_forward_pass_waits_for_the_device_once() -> None:
    network = CellEncoder(ModelConfig(vocab_size=500, width=128, n_heads=2, n_layers=3, dropout=0.0)).cuda()
    tokens = batch(*LAYOUTS["some asked"])
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as waits, torch.autocast("cuda", torch.bfloat16):
            network(tokens, "targets")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == 1
