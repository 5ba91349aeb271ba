"""Windows of a token stream as packed batches: what a step reads follows from the seed and its number alone."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seqtrain.data.corpus import TokenStream
from seqtrain.data.order import round_keys, window_at
from seqtrain.errors import ConfigError, DataError
from seqtrain.parallel import even_offsets

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end in one packed row of n tokens, or one part of that row.

    `tokens`, `labels`: int64 `[1, offsets[part + 1] - offsets[part]]`, all n where there is one part; a label is the
    token that follows in the same document, in this part or the next, -100 where none does.
    `offsets`: where the parts start in the row, and n. `cu_seqlens`: int32 `[N+1]` on the CPU, from 0 to n, the same
    for every part: a boundary where one of the rows starts and, unless switched off, a document.
    `bytes`: text bytes that the labels stand for; a document's end stands for none.
    """

    tokens: Tensor
    labels: Tensor
    offsets: tuple[int, ...]
    cu_seqlens: Tensor
    bytes: float

    @property
    def label_count(self) -> int:
        """How many labels count."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class Share:
    """What one process reads of a batch at a time; without arguments, all of it."""

    # Of the data-parallel ranks, this one.
    rank: int = 0
    ranks: int = 1
    # Of the micro-batches each of them reads one after the other, this one.
    micro_batch: int = 0
    micro_batches: int = 1
    # Of the pieces of this packed row, in time, this one.
    part: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.ranks, self
        assert 0 <= self.micro_batch < self.micro_batches, self
        assert 0 <= self.part < self.parts, self

    def rows(self, batch_size: int) -> range:
        """Which of a batch's rows they are. Raises `ConfigError` if they don't come out even."""
        shares = self.ranks * self.micro_batches
        if batch_size % shares:
            raise ConfigError(
                f"train.batch_size={batch_size}: must be a multiple of data-parallel ranks x micro-batches "
                f"= {self.ranks} x {self.micro_batches}; {math.ceil(batch_size / shares) * shares} is"
            )
        size = batch_size // shares
        first = (self.micro_batch * self.ranks + self.rank) * size
        return range(first, first + size)


WHOLE_BATCH = Share()


class _Windows:
    """Cuts windows of `sequence_length` out of a stream and lays the rows of one rank end to end."""

    def __init__(self, stream: TokenStream, sequence_length: int, batch_size: int, reset_at_documents: bool):
        for key, value in (("train.sequence_length", sequence_length), ("train.batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{key}={value}: at least 1 is needed")
        self.stream = stream
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.reset_at_documents = reset_at_documents

    def at(self, index: int, share: Share = WHOLE_BATCH) -> Batch:
        """A share of batch `index`, from 0 on. All shares together are the same however many there are."""
        rows = share.rows(self.batch_size)
        return self.pack([self._start(index * self.batch_size + row) for row in rows], share.part, share.parts)

    def _start(self, sample: int) -> int:
        """Where in the stream the window of row `sample` starts, counted over all batches."""
        raise NotImplementedError

    def pack(self, starts: list[int], part: int, parts: int) -> Batch:
        """Part `part` of the row whose windows start at the given positions; past the stream's end it is filling.

        Only this part's tokens are read; of the others, the places where documents start.
        """
        assert 0 <= part < parts, (part, parts)
        length = self.sequence_length
        offsets = even_offsets(len(starts) * length, parts)
        first, last = offsets[part], offsets[part + 1]
        tokens = np.empty(last - first, dtype=np.int64)
        labels = np.empty_like(tokens)
        for row in range(first // length, -(-last // length)):
            low, high = max(first, row * length), min(last, (row + 1) * length)
            tokens[low - first : high - first], labels[low - first : high - first] = self._read(
                starts[row] + low - row * length, high - low
            )
        counted = labels[labels != IGNORED]
        return Batch(
            tokens=torch.from_numpy(tokens)[None],
            labels=torch.from_numpy(labels)[None],
            offsets=offsets,
            cu_seqlens=self._boundaries(starts),
            bytes=self.stream.tokenizer.byte_count(counted) * self.stream.byte_scale,
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
                    # The filling behind the stream's end counts as a document of its own.
                    boundaries.append(row * length + end - start)
            boundaries.append((row + 1) * length)
        return torch.tensor(boundaries, dtype=torch.int32)


class Batches(_Windows):
    """Training batches: windows in a shuffled order that is a pure function of `(seed, step)`.

    An epoch reads every window once. Its windows start at another place than those of the epoch before, so that
    boundaries move and no token is left out for good. Raises `DataError` if the stream is shorter than one window.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        seed: int,
        sequence_length: int,
        batch_size: int,
        reset_at_documents: bool = True,
    ):
        super().__init__(stream, sequence_length, batch_size, reset_at_documents)
        self.seed = seed
        self.windows = stream.tokens // sequence_length
        if self.windows == 0:
            raise DataError(
                f"train.sequence_length={sequence_length}: the {stream.name} text has only {stream.tokens} tokens; "
                "use a shorter sequence or more text"
            )

    def _start(self, sample: int) -> int:
        epoch, window = window_at(sample, self.windows, self.seed)
        room = self.stream.tokens - self.windows * self.sequence_length
        return round_keys(self.seed, epoch)[-1] % (room + 1) + window * self.sequence_length


class EvaluationBatches(_Windows):
    """The stream from its start to its end, every token once, in batches of one size; what is left over is filled up.

    Every document's tokens but the first are predicted exactly once, so over all batches the sum of `Batch.bytes` is
    `stream.predicted_bytes`, and bits per byte = nats / ln 2 / bytes. `len()` is the number of batches, the same on
    every rank. `limit`: at most so many windows, spread evenly over the stream; 0 takes all.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        sequence_length: int,
        batch_size: int,
        reset_at_documents: bool = True,
        limit: int = 0,
    ):
        super().__init__(stream, sequence_length, batch_size, reset_at_documents)
        self.windows = math.ceil(stream.tokens / sequence_length)
        self.taken = min(limit or self.windows, self.windows)

    def __len__(self) -> int:
        return math.ceil(self.taken / self.batch_size)

    def _start(self, sample: int) -> int:
        if sample >= self.taken:
            return self.stream.tokens
        return sample * self.windows // self.taken * self.sequence_length
