"""What all compiled kernels share: the way they are compiled, the hash behind every draw and every comparison of cells, and the draw.

Numba notices changes in the file of a kernel only: after a change here, compiled kernels elsewhere are stale until their files are touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from jaxtyping import UInt32, UInt64
from numpy import ndarray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Odd number that spreads consecutive ids over all bits (2^64 over the golden ratio)."""
LARGEST = np.uint64(0xFFFFFFFFFFFFFFFF)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_1, _27, _30, _31 = (np.uint64(bits) for bits in (1, 27, 30, 31))


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


@jit
def threshold(hashes: UInt64[ndarray, "gene"], n: int) -> np.uint64:
    """A number that exactly n hashes do not exceed, found by interpolation: evenly spread numbers need four or five guesses."""
    low, high, n_low, n_high = np.uint64(0), LARGEST, 0, len(hashes)
    while high - low > _1:
        guess = low + np.uint64(np.float64(high - low) * ((n - n_low + 0.5) / (n_high - n_low + 1)))
        guess = min(max(guess, low + _1), high - _1)
        n_guess = 0
        for i in range(len(hashes)):
            n_guess += hashes[i] <= guess
        if n_guess == n:
            return guess
        if n_guess < n:
            low, n_low = guess, n_guess
        else:
            high, n_high = guess, n_guess
    return high  # only if a column stands twice in a row: more than n hashes


@jit
def keep(hashes: UInt64[ndarray, "gene"], n: int, kept: UInt32[ndarray, "gene+1"]) -> None:
    """List the n genes with the smallest hashes, in their order. Writing first and counting then avoids a branch."""
    largest, place = threshold(hashes, n) if n < len(hashes) else LARGEST, np.uint64(0)
    for i in range(len(hashes)):
        kept[place] = i
        place += np.uint64(hashes[i] <= largest)
