"""How one stream becomes rows: which of its positions the n-th row a run reads holds, by the seed and n alone."""

import hashlib
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from seqtrain.data.config import DataConfig
from seqtrain.data.stream import TokenStream
from seqtrain.errors import ConfigError, DataError

# Rounds of the Feistel network; four make a pseudo-random permutation of a random round function.
ROUNDS = 6
MASK = 2**64 - 1
# Documents that are packed together, and those of them that lie side by side in the stream.
BLOCK = 2**18
GROUP = 2**12


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

    @property
    def fill(self) -> float:
        """The share of rows that is no padding."""
        return 1.0


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


@dataclass(frozen=True)
class BestFit(Packing):
    """Whole documents, each in the fullest row that still has room for it; every epoch lays others together.

    Best-fit decreasing: the longest documents come first (arXiv 2404.10830). An epoch reads every document once, in
    blocks of `BLOCK` documents from `BLOCK / GROUP` places of the stream, and each block is planned when its first row
    is read; to go on at a row, the blocks before it are planned again. A document longer than a row is cut into rows
    and a rest, which is packed like a document. `documents_per_row`: at most so many; 0: no limit.
    """

    _: KW_ONLY
    seed: int
    documents_per_row: int = 0

    def rows(self, epoch: int) -> int:
        first, last = (number * self._blocks for number in (epoch, epoch + 1))
        return self._end(last) - self._end(first)

    def spans(self, epoch: int, row: int) -> Sequence[Span]:
        row += self._end(epoch * self._blocks)
        block = self._find(row)
        return self._plan(block).row(row - self._end(block))

    def locate(self, row: int) -> tuple[int, int]:
        epoch = self._find(row) // self._blocks
        return epoch, row - self._end(epoch * self._blocks)

    @property
    def fill(self) -> float:
        """The share of the first block's rows that is no padding."""
        plan = self._plan(0)
        return float((plan.stops - plan.starts).sum() / (len(plan) * self.length))

    @property
    def _groups(self) -> int:
        return math.ceil(self.stream.documents / GROUP)

    @property
    def _blocks(self) -> int:
        """Blocks in an epoch."""
        return math.ceil(self._groups * GROUP / BLOCK)

    @cached_property
    def _ends(self) -> list[int]:
        """Rows up to the end of each block that was planned so far, counted over epochs."""
        return []

    def _end(self, block: int) -> int:
        """The rows before `block`, counted over epochs."""
        while len(self._ends) < block:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._plan(len(self._ends))))
        return self._ends[block - 1] if block else 0

    def _find(self, row: int) -> int:
        """The block that holds a row, both counted over epochs."""
        while not self._ends or self._ends[-1] <= row:
            self._end(len(self._ends) + 1)
        return bisect_right(self._ends, row)

    @cached_property
    def _plan(self) -> "Callable[[int], _Plan]":
        # Rows of two blocks are read at once where one ends; twice that for readers that are ahead.
        return lru_cache(maxsize=4)(self._planned)

    def _planned(self, number: int) -> "_Plan":
        epoch, block = divmod(number, self._blocks)
        key = round_keys(self.seed, epoch)[-1]
        starts, stops = self._pieces(epoch, block)
        rows = _best_fit(stops - starts, scrambled(len(starts), key), self.length, self.documents_per_row)
        # Rows come in a random order, and so do documents in a row.
        rows = scrambled(int(rows.max()) + 1, key).argsort(kind="stable")[rows]
        order = np.lexsort((scrambled(len(starts), key ^ MASK), rows))
        return _Plan(starts[order], stops[order], np.bincount(rows).cumsum())

    def _pieces(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the documents of a block start and stop, those longer than a row in pieces."""
        stream, edges = self.stream, []
        for place in range(block * BLOCK // GROUP, min((block + 1) * BLOCK // GROUP, self._groups)):
            first = permute(place, self._groups, self.seed, epoch) * GROUP
            found = stream.document_starts(first, min(first + GROUP + 1, stream.documents))
            edges.append(found if len(found) > GROUP else np.append(found, stream.tokens))
        starts = np.concatenate([found[:-1] for found in edges])
        stops = np.concatenate([found[1:] for found in edges])
        pieces = -((starts - stops) // self.length)
        nth = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
        starts = np.repeat(starts, pieces) + nth * self.length
        return starts, np.minimum(starts + self.length, np.repeat(stops, pieces))


@dataclass(frozen=True)
class _Plan:
    """The rows of a block: pieces of the stream in the order of the rows; how many there are up to each row's end."""

    starts: np.ndarray
    stops: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, number: int) -> Sequence[Span]:
        held = slice(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))
        return [Span(*piece) for piece in zip(self.starts[held].tolist(), self.stops[held].tolist(), strict=True)]


def _best_fit(lengths: np.ndarray, ties: np.ndarray, capacity: int, most: int) -> np.ndarray:
    """int64 `[pieces]`: the row of each, laid one after the other, long ones first, into the fullest row with room.

    `ties` decides among equal lengths; `most`: pieces that a row takes, 0 for any number.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    # Rows by the room they have left, and those rooms in order; how many pieces each row holds.
    open_rows: dict[int, list[int]] = {}
    rooms: list[int] = []
    held: list[int] = []
    order = np.lexsort((ties, -lengths))
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(held), capacity - length
            held.append(0)
        else:
            row, room = open_rows[rooms[place]].pop(), rooms[place] - length
            if not open_rows[rooms[place]]:
                del open_rows[rooms.pop(place)]
        rows[piece] = row
        held[row] += 1
        if room and held[row] != most:
            if room not in open_rows:
                insort(rooms, room)
            open_rows.setdefault(room, []).append(row)
    return rows


def scrambled(count: int, key: int) -> np.ndarray:
    """uint64 `[count]`: random numbers, different ones, that `key` selects."""
    return _mix(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key))


def make_packing(config: DataConfig, stream: TokenStream, *, length: int, seed: int) -> Packing:
    """The packing that `data.packing` names, for training."""
    if config.packing == "stream":
        return ShuffledWindows(stream, length=length, seed=seed)
    most = 1 if config.packing == "document" else config.documents_per_row
    return BestFit(stream, length=length, seed=seed, documents_per_row=most)


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


def _mix(value: Any) -> Any:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): each bit of the result depends on every bit.

    Of an int, or of each number of a uint64 array.
    """
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
