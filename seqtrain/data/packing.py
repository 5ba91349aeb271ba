"""How one stream becomes rows: which of its positions the n-th row a run reads holds, by the seed and n alone."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import NamedTuple

from seqtrain.data.stream import TokenStream
from seqtrain.errors import ConfigError, DataError

# Rounds of the Feistel network; four make a pseudo-random permutation of a random round function.
ROUNDS = 6
MASK = 2**64 - 1


class Span(NamedTuple):
    """The positions `start <= position < stop` of a stream."""

    start: int
    stop: int


@dataclass(frozen=True)
class Packing:
    """Base of the ways to fill rows of `length` tokens from a stream, epoch by epoch."""

    stream: TokenStream
    _: KW_ONLY
    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"train.sequence_length={self.length}: at least 1 is needed")

    def rows(self, epoch: int) -> int:
        """How many rows an epoch has; at least one."""
        raise NotImplementedError

    def spans(self, epoch: int, row: int) -> Sequence[Span]:
        """What row `row` of an epoch holds, laid end to end; the rest of it is padding."""
        raise NotImplementedError

    def locate(self, row: int) -> tuple[int, int]:
        """`(epoch, row in it)` of the `row`-th row that is read of the stream."""
        raise NotImplementedError


@dataclass(frozen=True)
class Windows(Packing):
    """The stream cut into windows from its start to its end, in this order; the last may be shorter."""

    def rows(self, epoch: int = 0) -> int:
        return math.ceil(self.stream.tokens / self.length)

    def spans(self, epoch: int, row: int) -> Sequence[Span]:
        return [Span(row * self.length, min((row + 1) * self.length, self.stream.tokens))]

    def locate(self, row: int) -> tuple[int, int]:
        return divmod(row, self.rows())


@dataclass(frozen=True)
class ShuffledWindows(Packing):
    """The stream cut into whole windows, in an order that `(seed, epoch)` selects.

    An epoch reads every window once. Its windows start at another place than those of the epoch before, so that
    boundaries move and no token is left out for good. Raises `DataError` if the stream is shorter than one window.
    """

    _: KW_ONLY
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows() == 0:
            raise DataError(
                f"train.sequence_length={self.length}: the {self.stream.name} text has only "
                f"{self.stream.tokens} tokens; use a shorter sequence or more text"
            )

    def rows(self, epoch: int = 0) -> int:
        return self.stream.tokens // self.length

    def spans(self, epoch: int, row: int) -> Sequence[Span]:
        room = self.stream.tokens - self.rows() * self.length
        window = permute(row, self.rows(), self.seed, epoch)
        start = round_keys(self.seed, epoch)[-1] % (room + 1) + window * self.length
        return [Span(start, start + self.length)]

    def locate(self, row: int) -> tuple[int, int]:
        return divmod(row, self.rows())


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
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): each bit of the result depends on every bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
