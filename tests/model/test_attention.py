"""Every attention back end equals the boolean mask, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from annformer.model import attention
from annformer.model.attention import BACKENDS, Layout, attend
from annformer.tokens import TokenBatch


def batch(lengths: list[int], n_visible: list[int]) -> TokenBatch:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    n = int(offsets[-1])
    return TokenBatch(torch.zeros(n, dtype=torch.long), torch.zeros(n), None, None, offsets, torch.tensor(n_visible), None, None, {}, None)


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, max_q: int, max_k: int, scale: float) -> Tensor:
    """What the flash call computes, one sequence after the other, and a check of what it is promised."""
    assert q.shape[-1] % 8 == 0 or q.shape[-1] == DEPTH, "flash kernels want a multiple of 8"
    assert max_q >= int(q_offsets.diff().max())
    assert max_k >= int(k_offsets.diff().max())
    parts = []
    for i in range(len(q_offsets) - 1):
        a, b = (x[o[i] : o[i + 1]] for x, o in ((q, q_offsets), (k, k_offsets)))
        weights = (torch.einsum("qhd,khd->hqk", a, b) * scale).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[k_offsets[i] : k_offsets[i + 1]]))
    return torch.cat(parts)


DEPTH = 7
LAYOUTS = {
    "all visible": ([5, 9, 1, 4], [5, 9, 1, 4]),
    "some asked": ([5, 9, 2, 4], [3, 1, 2, 2]),
    "alike": ([6, 6, 6], [4, 4, 4]),
    "alike, all visible": ([6, 6], [6, 6]),
    "only <cls> visible": ([4, 3], [1, 1]),
    "one cell": ([8], [5]),
    "some alike": ([6, 5, 6, 1, 5], [4, 2, 4, 1, 2]),
}


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("rows", ["all", "cls", "some"])
def test_equal_to_the_mask(backend: str, name: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_varlen_call", plain_varlen)
    tokens = batch(*LAYOUTS[name])
    layout = Layout.of(tokens)
    if rows == "cls":
        layout = Layout.of_cells(tokens)[1]
    elif rows == "some":
        generator = torch.Generator().manual_seed(3)
        mask = torch.rand(tokens.n_tokens, generator=generator) < 0.5
        mask[tokens.offsets[:-1]] = True
        layout = Layout.of_marked(tokens, mask)[1]
        assert layout.rows is not None and torch.equal(layout.rows, mask.nonzero()[:, 0])
    if backend == "varlen":
        layout = layout._replace(keys=attention._flash_keys(layout, tokens, torch.tensor(layout.queries)))
    if backend == "dense" and not layout.alike:
        pytest.skip("the dense back end is for batches of like cells")
    torch.manual_seed(0)
    n_rows = tokens.n_tokens if layout.rows is None else len(layout.rows)
    inputs = [torch.randn(n, 3, DEPTH, dtype=torch.float64, requires_grad=True) for n in (n_rows, tokens.n_tokens, tokens.n_tokens)]
    upstream = torch.randn(n_rows, 3, DEPTH, dtype=torch.float64)
    expected = attend(*inputs, layout, backend="reference")
    found = attend(*inputs, layout, backend=backend)
    assert found.shape == expected.shape
    assert float((found - expected).detach().abs().max()) < 1e-12
    for want, have in zip(torch.autograd.grad(expected, inputs, upstream), torch.autograd.grad(found, inputs, upstream), strict=True):
        assert float((want - have).abs().max()) < 1e-12


def test_reference_is_the_rule() -> None:
    """The reference itself: change one token and see who notices."""
    tokens = batch([4, 3], [2, 3])
    layout = Layout.of(tokens)
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, 2, 4, dtype=torch.float64) for _ in range(3))
    before = attend(q, k, v, layout, backend="reference")
    for changed, expected in {0: {0, 1, 2, 3}, 1: {0, 1, 2, 3}, 2: {2}, 3: {3}, 4: {4, 5, 6}, 6: {4, 5, 6}}.items():
        other = v.clone()
        other[changed] += 1
        after = attend(q, k, other, layout, backend="reference")
        noticed = {int(i) for i in ((after - before).abs().amax((1, 2)) > 1e-9).nonzero()[:, 0]}
        assert noticed == expected


def test_choice_of_backend() -> None:
    q = torch.zeros(1, 1, 8)
    assert attention._choose(q, Layout.of(batch([3, 3], [2, 2]))) == "dense"
    assert attention._choose(q, Layout.of(batch([3, 4], [2, 2]))) == "per_cell"


def test_attention_dropout_is_refused_where_it_does_not_exist() -> None:
    tokens = batch([3], [3])
    q = torch.zeros(3, 1, 8)
    with pytest.raises(NotImplementedError, match="attention_dropout"):
        attend(q, q, q, Layout.of(tokens), dropout=0.1, backend="varlen")


@pytest.mark.parametrize("name", LAYOUTS)
def test_half_precision_on_a_cpu_is_computed_in_single(name: str) -> None:
    layout = Layout.of(batch(*LAYOUTS[name]))
    torch.manual_seed(0)
    half = [torch.randn(sum(layout.lengths), 2, 8).bfloat16().requires_grad_() for _ in range(3)]
    single = [x.detach().float().requires_grad_() for x in half]
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*half, layout)
    expected = attend(*single, layout)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad(found, half, upstream), torch.autograd.grad(expected, single, upstream.float())
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_flash_call_gets_half_precision_and_loses_little(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the kernel: the own score, split in two, is as exact as if it had not been rounded."""
    seen: list[torch.dtype] = []

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
        seen.extend((q.dtype, k.dtype, v.dtype))
        return plain_varlen(q.double(), k.double(), v.double(), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "_varlen_call", call)
    tokens = batch(*LAYOUTS[name])
    layout = Layout.of(tokens)
    layout = layout._replace(keys=attention._flash_keys(layout, tokens, tokens.offsets.diff()))
    torch.manual_seed(0)
    q, k, v = (4 * torch.randn(tokens.n_tokens, 3, 16).bfloat16() for _ in range(3))
    found = attention._varlen(q, k, v, layout, 0.0)
    expected = attend(q.double(), k.double(), v.double(), layout, backend="reference")
    assert set(seen) == {torch.bfloat16}
    assert float((found - expected).abs().max()) < 2e-3 * float(expected.abs().max())
