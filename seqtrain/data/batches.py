"""Windows of a token stream as packed batches: what a step reads follows from the seed and its number alone."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seqtrain.data.corpus import TokenStream
from seqtrain.data.order import round_keys, window_at
from seqtrain.errors import ConfigError, DataError

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end in one packed row.

    `tokens`, `labels`: int64 `[1, n]`; a label is the token that follows in the same document, -100 where none does.
    `cu_seqlens`: int32 `[N+1]` on the CPU, from 0 to n: a border where a row starts and, unless switched off, a
    document. `bytes`: text bytes that the labels stand for; a document's end stands for none.
    """

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    bytes: float

    @property
    def label_count(self) -> int:
        """How many labels count."""
        return int((self.labels != IGNORED).sum())


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

    def rows(self, rank: int, ranks: int, micro_batch: int, micro_batches: int) -> range:
        """The rows of the global batch that one rank reads in one micro-batch.

        Raises `ConfigError` if they don't come out even.
        """
        parts = ranks * micro_batches
        if self.batch_size % parts:
            raise ConfigError(
                f"train.batch_size={self.batch_size}: must be a multiple of data-parallel ranks x micro-batches "
                f"= {ranks} x {micro_batches}; {math.ceil(self.batch_size / parts) * parts} is"
            )
        assert 0 <= rank < ranks, (rank, ranks)
        assert 0 <= micro_batch < micro_batches, (micro_batch, micro_batches)
        size = self.batch_size // parts
        first = (micro_batch * ranks + rank) * size
        return range(first, first + size)

    def pack(self, starts: list[int]) -> Batch:
        """The batch whose rows start at the given positions; past the stream's end a row is filled, without labels."""
        tokens = np.empty((len(starts), self.sequence_length), dtype=np.int64)
        labels = np.empty_like(tokens)
        borders = [np.zeros(1, dtype=np.int64)]
        for row, start in enumerate(starts):
            tokens[row], labels[row], inner = self._row(start)
            if self.reset_at_documents:
                borders.append(inner + row * self.sequence_length)
            borders.append(np.array([(row + 1) * self.sequence_length]))
        counted = labels[labels != IGNORED]
        return Batch(
            tokens=torch.from_numpy(tokens).view(1, -1),
            labels=torch.from_numpy(labels).view(1, -1),
            cu_seqlens=torch.from_numpy(np.concatenate(borders).astype(np.int32)),
            bytes=self.stream.tokenizer.byte_count(counted) * self.stream.byte_scale,
        )

    def _row(self, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`(tokens, labels, where documents start inside the row)` of the window at `start`."""
        length = self.sequence_length
        # One token more than the window: it is the label of the last.
        held = min(length + 1, self.stream.tokens - start)
        ids = np.full(length + 1, self.stream.tokenizer.end, dtype=np.int64)
        ids[:held] = self.stream.read(start, start + held)
        labels = ids[1:].copy()
        labels[max(held - 1, 0) :] = IGNORED
        # A document's first token follows on nothing.
        inner = self.stream.starts(start + 1, start + held) - start
        labels[inner - 1] = IGNORED
        # The filling behind the stream's end counts as a document of its own.
        inner = np.append(inner, held) if held else inner
        return ids[:length], labels, inner[inner < length]


class Batches(_Windows):
    """Training batches: windows in a shuffled order that is a pure function of `(seed, step)`.

    An epoch reads every window once. Its windows start at another place than those of the epoch before, so that
    borders move and no token is left out for good. Raises `DataError` if the stream is shorter than one window.
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

    def at(self, step: int, *, rank: int = 0, ranks: int = 1, micro_batch: int = 0, micro_batches: int = 1) -> Batch:
        """What `rank` of `ranks` data-parallel ranks reads in one of the micro-batches of `step`, which counts from 0.

        The rows of all ranks and micro-batches together are the same however many there are.
        """
        rows = self.rows(rank, ranks, micro_batch, micro_batches)
        return self.pack([self._start(step * self.batch_size + row) for row in rows])

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

    def at(self, index: int, *, rank: int = 0, ranks: int = 1, micro_batch: int = 0, micro_batches: int = 1) -> Batch:
        """What `rank` of `ranks` reads in one of the micro-batches of batch `index`."""
        rows = self.rows(rank, ranks, micro_batch, micro_batches)
        return self.pack([self._start(index * self.batch_size + row) for row in rows])

    def _start(self, sample: int) -> int:
        if sample >= self.taken:
            return self.stream.tokens
        return sample * self.windows // self.taken * self.sequence_length
