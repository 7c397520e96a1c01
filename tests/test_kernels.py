"""What compiled kernels share."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from annformer.kernels import jit, mix, mix_in_place


def test_kernels_compile_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def refusing(function: object, *, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")  # noqa: EM101  # numba's words
        return njit(function, **options)

    monkeypatch.setattr(numba, "njit", refusing)
    assert jit(lambda x: x + 1)(1) == 2


def test_both_forms_of_the_hash_agree_and_lose_nothing() -> None:
    x = np.random.default_rng(0).integers(0, 2**64, 10_000, np.uint64)
    mixed = x.copy()
    mix_in_place(mixed)
    assert mixed.tolist() == [int(mix(number)) for number in x]
    assert len(np.unique(mixed)) == len(np.unique(x))


def test_every_bit_reaches_every_bit() -> None:
    x = np.random.default_rng(1).integers(0, 2**64, 4_000, np.uint64)
    before = x.copy()
    mix_in_place(before)
    for bit in range(64):
        after = x ^ np.uint64(1 << bit)
        mix_in_place(after)
        flipped = np.unpackbits((before ^ after).view(np.uint8)).reshape(len(x), 64).mean(0)
        assert np.abs(flipped - 0.5).max() < 0.05
