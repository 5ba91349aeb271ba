"""Tokens on disk as packed batches: what a step reads follows from the seed and its number alone."""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from seqtrain.data.shards import Shard, SplitEntry
from seqtrain.data.tokenizer import Tokenizer
from seqtrain.errors import ConfigError, DataError

IGNORED = -100
# Each open shard holds two file descriptors, of which a process may commonly have 1024.
OPEN_SHARDS = 64
# Rounds of the Feistel network; four make a pseudo-random permutation of a random round function.
ROUNDS = 6
MASK = 2**64 - 1


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end in one packed row of n tokens, or one part of that row in time: what one forward pass reads.

    `tokens`, `labels`: int64 `[1, offsets[part + 1] - offsets[part]]`, all n where there is one part; a label is the
    token that follows in the same document, in this part or the next, -100 where none does.
    `offsets`: where the parts start in the row, and n. `cu_seqlens`: int32 `[N+1]` on the CPU, from 0 to n, the same
    for every part: a boundary where one of the rows starts and, unless switched off, a document.
    """

    tokens: Tensor
    labels: Tensor
    offsets: tuple[int, ...]
    cu_seqlens: Tensor

    @property
    def label_count(self) -> int:
        """How many labels count."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tokens and labels on `device`."""
        return replace(self, tokens=self.tokens.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class BatchSlice:
    """What one process reads of a batch at a time; without arguments, all of it."""

    # Of the data-parallel ranks, this one.
    rank: int = 0
    ranks: int = 1
    # Of the micro-batches each of them reads one after the other, this one.
    micro_batch: int = 0
    micro_batches: int = 1
    # Of the sequence-parallel ranks, which divide this packed row in time, this one.
    part: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.ranks, self
        assert 0 <= self.micro_batch < self.micro_batches, self
        assert 0 <= self.part < self.parts, self

    def rows(self, batch_size: int) -> range:
        """Which of a batch's rows they are. Raises `ConfigError` if they don't come out even."""
        slices = self.ranks * self.micro_batches
        if batch_size % slices:
            raise ConfigError(
                f"train.batch_size={batch_size}: must be a multiple of data-parallel ranks x micro-batches "
                f"= {self.ranks} x {self.micro_batches}; use {math.ceil(batch_size / slices) * slices}"
            )
        size = batch_size // slices
        first = (self.micro_batch * self.ranks + self.rank) * size
        return range(first, first + size)

    def tokens(self, offsets: tuple[int, ...]) -> slice:
        """Which tokens of the packed row they are; `offsets`: where its parts start, and its end."""
        return slice(offsets[self.part], offsets[self.part + 1])


WHOLE_BATCH = BatchSlice()


def even_offsets(tokens: int, parts: int) -> tuple[int, ...]:
    """Boundaries of `parts` pieces of `tokens` whose lengths differ by one at most: `parts + 1` numbers from 0."""
    return tuple(tokens * part // parts for part in range(parts + 1))


class TokenStream:
    """One split as one long row of ids, its documents in order, each closed by the tokenizer's `end`."""

    def __init__(self, name: str, entry: SplitEntry, shards: list[Shard], tokenizer: Tokenizer):
        self.name = name
        self.documents = entry.documents
        self.tokens = entry.tokens
        self.bytes = entry.bytes
        self.tokenizer = tokenizer
        # Text bytes for each byte counted from tokens: 1 unless the tokenizer normalises its text.
        self.byte_scale = entry.bytes / entry.token_bytes if entry.token_bytes else 1.0
        # Bytes of everything that is predicted: all but the first token of each document.
        self.predicted_bytes = (entry.token_bytes - entry.first_bytes) * self.byte_scale
        self._shards = shards
        self._ends = list(accumulate(shard.entry.tokens for shard in shards))
        self._maps = lru_cache(maxsize=OPEN_SHARDS)(lambda number: (shards[number].ids(), shards[number].starts()))

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 `[stop - start]`: the ids at `start <= position < stop`, which must lie in the stream."""
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        parts = [self._maps(number)[0][low:high] for number, low, high in self._pieces(start, stop)]
        return np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, dtype=np.int64)

    def starts(self, start: int, stop: int) -> np.ndarray:
        """int64: the positions `start <= position < stop` at which a document starts, rising."""
        found = [np.empty(0, dtype=np.int64)]
        for number, low, high in self._pieces(start, stop):
            starts = self._maps(number)[1]
            first, last = np.searchsorted(starts, [low, high])
            found.append(starts[first:last] + (self._ends[number] - self._shards[number].entry.tokens))
        return np.concatenate(found)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """`(shard, from, to)`, counted inside the shard, for every shard that `start` to `stop` touches."""
        number = bisect_right(self._ends, start)
        while start < stop and number < len(self._ends):
            base = self._ends[number] - self._shards[number].entry.tokens
            end = min(stop, self._ends[number])
            yield number, start - base, end - base
            start = end
            number += 1


@dataclass(frozen=True)
class _Windows:
    """Cuts windows of `sequence_length` out of a stream and lays the rows of one rank end to end."""

    stream: TokenStream
    _: KW_ONLY
    sequence_length: int
    batch_size: int
    reset_at_documents: bool = True

    def __post_init__(self) -> None:
        for key, value in (("train.sequence_length", self.sequence_length), ("train.batch_size", self.batch_size)):
            if value < 1:
                raise ConfigError(f"{key}={value}: at least 1 is needed")

    def at(self, index: int, part: BatchSlice = WHOLE_BATCH) -> Batch:
        """A slice of batch `index`, from 0 on. All slices together are the same however many there are."""
        return self._pack([self._start(index * self.batch_size + row) for row in part.rows(self.batch_size)], part)

    def _start(self, sample: int) -> int:
        """Where in the stream the window of row `sample` starts, counted over all batches."""
        raise NotImplementedError

    def _pack(self, starts: list[int], part: BatchSlice) -> Batch:
        """A part of the row whose windows start at the given positions; past the stream's end it is padding.

        Only this part's tokens are read; of the others, the places where documents start.
        """
        length = self.sequence_length
        offsets = even_offsets(len(starts) * length, part.parts)
        own = part.tokens(offsets)
        first, last = own.start, own.stop
        tokens = np.empty(last - first, dtype=np.int64)
        labels = np.empty_like(tokens)
        for row in range(first // length, -(-last // length)):
            low, high = max(first, row * length), min(last, (row + 1) * length)
            tokens[low - first : high - first], labels[low - first : high - first] = self._read(
                starts[row] + low - row * length, high - low
            )
        return Batch(
            tokens=torch.from_numpy(tokens)[None],
            labels=torch.from_numpy(labels)[None],
            offsets=offsets,
            cu_seqlens=self._boundaries(starts),
        )

    def _read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens from position `start` on, and their labels."""
        start = min(start, self.stream.tokens)
        # One token more: it is the label of the last.
        held = min(count + 1, self.stream.tokens - start)
        ids = np.full(count + 1, self.stream.tokenizer.end, dtype=np.int64)
        ids[:held] = self.stream.read(start, start + held)
        labels = ids[1:].copy()
        labels[max(held - 1, 0) :] = IGNORED
        # A document's first token follows on nothing.
        labels[self.stream.starts(start + 1, start + held) - start - 1] = IGNORED
        return ids[:count], labels

    def _boundaries(self, starts: list[int]) -> Tensor:
        """The boundaries of the whole row: where windows start and, if they reset the state, documents."""
        length, end = self.sequence_length, self.stream.tokens
        boundaries = [0]
        for row, start in enumerate(starts):
            if self.reset_at_documents:
                boundaries.extend(row * length + self.stream.starts(start + 1, min(start + length, end)) - start)
                if start < end < start + length:
                    # The padding after the stream's end counts as a document of its own.
                    boundaries.append(row * length + end - start)
            boundaries.append((row + 1) * length)
        return torch.tensor(boundaries, dtype=torch.int32)


@dataclass(frozen=True, kw_only=True)
class Batches(_Windows):
    """Training batches: windows in a shuffled order that is a pure function of `(seed, step)`.

    An epoch reads every window once. Its windows start at another place than those of the epoch before, so that
    boundaries move and no token is left out for good. Raises `DataError` if the stream is shorter than one window.
    """

    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows == 0:
            raise DataError(
                f"train.sequence_length={self.sequence_length}: the {self.stream.name} text has only "
                f"{self.stream.tokens} tokens; use a shorter sequence or more text"
            )

    @property
    def windows(self) -> int:
        return self.stream.tokens // self.sequence_length

    def _start(self, sample: int) -> int:
        epoch, window = window_at(sample, self.windows, self.seed)
        room = self.stream.tokens - self.windows * self.sequence_length
        return round_keys(self.seed, epoch)[-1] % (room + 1) + window * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class EvaluationBatches(_Windows):
    """The stream from its start to its end, every token once, in batches of one size; the last one is padded.

    Every document's tokens but the first are predicted exactly once, so over all batches the sum of `text_bytes` is
    `stream.predicted_bytes`, and bits per byte = nats / ln 2 / bytes. `len()` is the number of batches, the same on
    every rank. `limit`: at most so many windows, spread evenly over the stream; 0 takes all.
    """

    limit: int = 0

    @property
    def windows(self) -> int:
        return math.ceil(self.stream.tokens / self.sequence_length)

    @property
    def taken(self) -> int:
        return min(self.limit or self.windows, self.windows)

    def __len__(self) -> int:
        return math.ceil(self.taken / self.batch_size)

    def text_bytes(self, batch: Batch) -> float:
        """Bytes of text that the labels of `batch` stand for; a document's end stands for none."""
        labels = batch.labels.cpu()
        counted = labels[labels != IGNORED]
        return self.stream.tokenizer.byte_count(counted) * self.stream.byte_scale

    def _start(self, sample: int) -> int:
        if sample >= self.taken:
            return self.stream.tokens
        return sample * self.windows // self.taken * self.sequence_length


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
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): each bit of the result depends on every bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
