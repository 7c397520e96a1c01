"""Dropout drops as often as it says, keeps the mean, and repeats with the seed."""

from __future__ import annotations

import pytest
import torch

from annformer.model.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drops_a_share_and_scales_the_rest(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out = Dropout(p)(torch.ones(1001, 333, dtype=dtype))
    n = out.numel()
    assert abs(int((out == 0).sum()) - p * n) < 4 * (p * (1 - p) * n) ** 0.5
    kept = out[out != 0]
    assert torch.allclose(kept, torch.tensor(1 / (1 - p), dtype=dtype), rtol=1e-4 if dtype == torch.float32 else 1e-2)
    assert bool((kept == kept[0]).all())


def test_neighbours_are_independent() -> None:
    """Four elements share a random number."""
    torch.manual_seed(1)
    dropped = (Dropout(0.5)(torch.ones(400_000)) == 0).view(-1, 4).float()
    assert float((torch.corrcoef(dropped.T) - torch.eye(4)).abs().max()) < 4 / 100_000**0.5


def test_the_gradient_passes_where_the_value_does() -> None:
    x = torch.ones(50, 7, requires_grad=True)
    torch.manual_seed(3)
    out = Dropout(0.3)(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())  # type: ignore[arg-type]
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.3)(x), out)


def test_changes_nothing_outside_training() -> None:
    x = torch.randn(5)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert Dropout(0.5)(torch.ones(0, 3)).shape == (0, 3)
