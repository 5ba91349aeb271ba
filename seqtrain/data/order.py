"""A shuffled order that needs no memory: the window at any place of any epoch, from the seed alone."""

import hashlib
from functools import lru_cache

# Rounds of the Feistel network; four make a pseudo-random permutation of a random round function.
ROUNDS = 6
MASK = 2**64 - 1


def window_at(sample: int, windows: int, seed: int) -> tuple[int, int]:
    """`(epoch, window)` of the `sample`-th window a run with this seed reads; an epoch reads each window once."""
    epoch, place = divmod(sample, windows)
    return epoch, permute(place, windows, seed, epoch)


def permute(place: int, size: int, seed: int, epoch: int) -> int:
    """The image of `place` under a permutation of `range(size)` that `(seed, epoch)` selects.

    A Feistel network over the next power of four, walked until it lands inside `range(size)` (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"): at most four tries on average, and no table.
    """
    assert 0 <= place < size, (place, size)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = round_keys(seed, epoch)
    while True:
        place = _encrypt(place, half, keys)
        if place < size:
            return place


@lru_cache(maxsize=8)
def round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """`ROUNDS` numbers of 64 bits that depend on every bit of `seed` and `epoch`."""
    digests = (hashlib.sha256(f"{seed}/{epoch}/{number}".encode()).digest() for number in range(ROUNDS + 1))
    return tuple(int.from_bytes(digest[:8]) for digest in digests)


def _encrypt(value: int, half: int, keys: tuple[int, ...]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys[:ROUNDS]:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): each bit of the result depends on every bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
