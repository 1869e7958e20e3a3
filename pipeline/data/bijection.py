"""Shuffle [0, n) without a table: any position of the permutation in O(1) time and memory.

A Feistel network is a keyed bijection of the numbers of a few bits (Luby & Rackoff 1988): each of
its rounds adds a hash of one half of the bits to the other half. A number that leaves [0, n) is
sent through again until it comes back (cycle walking: Black & Rogaway 2002), less than once on
average. ``random_index_shuffle`` of TensorFlow and ``index_shuffle`` of Grain work like this.

With few bits the permutations are visibly not uniform: use it for ``SMALLEST`` items or more.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

SMALLEST = 65_536
ROUNDS = 8
Words = NDArray[np.uint64]


def shuffled(positions: NDArray[np.int64], n: int, key: str) -> NDArray[np.int64]:
    """Return what a permutation of ``range(n)`` has at some positions: int64, of the same shape.

    Args:
        positions: int64 in [0, n).
        n: number of items, at least 2.
        key: names the permutation.
    """
    digest = blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8").astype(np.uint64)
    bits = (n - 1).bit_length()
    out = _feistel(positions.astype(np.uint64), bits, keys)
    while len(outside := np.flatnonzero(out >= np.uint64(n))):
        out[outside] = _feistel(out[outside], bits, keys)
    return out.astype(np.int64)


def _feistel(numbers: Words, bits: int, keys: Words) -> Words:
    """Return a bijection of [0, 2**bits): the halves differ by a bit if ``bits`` is odd."""
    width = np.uint64(bits // 2)
    low_mask = (np.uint64(1) << width) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits - bits // 2)) - np.uint64(1)
    high, low = numbers >> width, numbers & low_mask
    for index in range(0, len(keys), 2):
        high ^= _hash(low, keys[index]) & high_mask
        low ^= _hash(high, keys[index + 1]) & low_mask
    return high << width | low


def _hash(words: Words, key: np.uint64) -> Words:
    """Return 64 mixed bits per word: the finaliser of SplitMix64 (Steele et al. 2014)."""
    mixed = words ^ key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
