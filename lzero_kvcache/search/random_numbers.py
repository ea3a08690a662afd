"""Counter-based random numbers of a search, compiled: each is a function of a key and a counter, and no generator has a
state.

A key is (seed, number of the search), a counter is (row, simulation, index, purpose); each word has 32 bits.
"""
import math
from typing import Any, Tuple

import numpy as np

from ..engine.compiling import inner

_KEY_0, _KEY_1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_FACTOR_0, _FACTOR_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_HALF, _UNIT = np.uint64(32), 2.0 ** -32

PhiloxKey = Tuple[np.uint32, np.uint32]
Words = Tuple[np.uint32, np.uint32, np.uint32, np.uint32]


@inner
def philox(key: PhiloxKey, counter: Words) -> Words:
    """Philox-4x32-10 (Salmon et al., 2011): the generator of Random123, and of Triton."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        high, low = _FACTOR_0 * np.uint64(a), _FACTOR_1 * np.uint64(c)
        a, c = np.uint32(low >> _HALF) ^ b ^ k, np.uint32(high >> _HALF) ^ d ^ m
        b, d = np.uint32(low), np.uint32(high)
        k, m = np.uint32(k + _KEY_0), np.uint32(m + _KEY_1)
    return a, b, c, d


@inner
def draw(key: PhiloxKey, row: int, simulation: int, index: int, purpose: int) -> Words:
    """The four random words of a counter."""
    return philox(key, (np.uint32(row), np.uint32(simulation), np.uint32(index), np.uint32(purpose)))


@inner
def below(word: np.uint32, limit: int) -> Any:
    """A word as a number from 0 to ``limit - 1``."""
    return np.int64((np.uint64(word) * np.uint64(limit)) >> _HALF)


@inner
def uniform(words: Words) -> Any:
    """Words as a number of [0, 1)."""
    return (words[0] + words[1] * _UNIT) * _UNIT


@inner
def normal(words: Words) -> float:
    """Words as a number of the standard normal distribution (Box and Muller)."""
    radius = math.sqrt(-2.0 * math.log((words[0] + 1.0) * _UNIT))
    return radius * math.cos(2.0 * math.pi * words[1] * _UNIT)
