"""What all compiled kernels share: the way they are compiled, and the hash behind every draw and every comparison of cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from jaxtyping import UInt64
from numpy import ndarray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Odd number that spreads consecutive ids over all bits (2^64 over the golden ratio)."""
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31 = (np.uint64(bits) for bits in (27, 30, 31))


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use, once per machine; without holding the interpreter, so that threads read and tokenize side by side."""
    try:
        return numba.njit(function, cache=True, nogil=True)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written: compile in every process
        return numba.njit(function, nogil=True)


@jit
def mix(x: np.uint64) -> np.uint64:
    """Finaliser of splitmix64: a bijection in which every bit of x reaches every bit of the result."""
    x = (x ^ (x >> _30)) * _MIX_1
    x = (x ^ (x >> _27)) * _MIX_2
    return x ^ (x >> _31)


def mix_in_place(x: UInt64[ndarray, "..."]) -> None:
    """`mix` of every element, by numpy."""
    for shift, factor in ((_30, _MIX_1), (_27, _MIX_2)):
        x ^= x >> shift
        x *= factor
    x ^= x >> _31
