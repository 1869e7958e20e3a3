"""Shuffle [0, n): as a table, or without one, any position in O(1) time and memory.

``permutation`` is the table. It sorts random words, raw Philox bits, which numpy guarantees (NEP
19). The others compute single positions.

A Feistel network is a keyed bijection of the numbers of a few bits (Luby & Rackoff 1988): each of
its rounds adds a hash of one half of the bits to the other half. A number that leaves [0, n) is
sent through again until it comes back (cycle walking: Black & Rogaway 2002), less than once on
average. ``random_index_shuffle`` of TensorFlow and ``index_shuffle`` of Grain work like this.

With few bits and few rounds the permutations are visibly not uniform: use ``shuffled`` for
``SMALLEST`` items or more. ``shuffled_each`` takes any number, with ``MORE_ROUNDS`` for few.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

SMALLEST = 65_536
ROUNDS = 8
FEW_BITS, MORE_ROUNDS = 8, 24
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the step between keys, as in SplitMix64
Words = NDArray[np.uint64]
Ids = NDArray[np.int64]


def permutation(n: int, key: str) -> Ids:
    """Return a uniform permutation of ``range(n)``, which depends only on ``key``: int64 (n,)."""
    words = np.frombuffer(blake2b(key.encode(), digest_size=16).digest(), "<u8")
    raw = np.random.Philox(key=words).random_raw(n)
    # The index in the low bits makes every word distinct, so the sort needs no tie rule.
    low = np.uint64(max(1, (n - 1).bit_length()) if n else 1)
    tagged = (raw >> low << low) | np.arange(n, dtype=np.uint64)
    tagged.sort()
    return (tagged & ((np.uint64(1) << low) - np.uint64(1))).astype(np.int64)


def shuffled(positions: Ids, n: int, key: str) -> Ids:
    """Return what a permutation of ``range(n)`` has at some positions: int64, of the same shape.

    Args:
        positions: int64 in [0, n).
        n: number of items, at least 2.
        key: names the permutation.
    """
    digest = blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8").astype(np.uint64)
    return _walked(positions, n, keys[:, None])


def shuffled_each(positions: Ids, n: int, words: Words) -> Ids:
    """Return what a permutation of ``range(n)`` has at a position, another permutation per row.

    Args:
        positions: int64 (rows,) in [0, n).
        n: number of items, at least 1.
        words: uint64 (rows,): names each row's permutation; make them with ``words_of``.
    """
    rounds = MORE_ROUNDS if (n - 1).bit_length() <= FEW_BITS else ROUNDS
    return _walked(positions, n, words + np.arange(rounds, dtype=np.uint64)[:, None] * GOLDEN)


def words_of(key: str, numbers: Ids) -> Words:
    """Return a random word for each number, a function of key and number: uint64, same shape."""
    first = np.frombuffer(blake2b(key.encode(), digest_size=8).digest(), "<u8").astype(np.uint64)
    return _hash(numbers.astype(np.uint64) * GOLDEN, first)


def _walked(positions: Ids, n: int, keys: Words) -> Ids:
    """Return the places of positions (rows,) under keys (rounds, 1 or rows), by cycle walking."""
    bits, limit = (n - 1).bit_length(), np.uint64(n)
    out = _feistel(positions.astype(np.uint64), bits, keys)
    while len(outside := np.flatnonzero(out >= limit)):
        own = keys if keys.shape[1] == 1 else keys[:, outside]
        out[outside] = _feistel(out[outside], bits, own)
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


def _hash(words: Words, key: Words) -> Words:
    """Return 64 mixed bits per word: the finaliser of SplitMix64 (Steele et al. 2014)."""
    mixed = words ^ key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
