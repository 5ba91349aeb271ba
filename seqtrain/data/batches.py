"""Rows of tokens as packed batches: what a step reads follows from the seed and its number alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from seqtrain.data.packing import Packing, Span
from seqtrain.data.stream import TokenStream
from seqtrain.errors import ConfigError

IGNORED = -100


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


@dataclass(frozen=True)
class Row:
    """What one row holds: spans of a stream laid end to end, and padding after them."""

    stream: TokenStream
    spans: Sequence[Span]

    def places(self) -> Iterator[tuple[int, Span]]:
        """Each span with its place in the row."""
        ends = accumulate(span.stop - span.start for span in self.spans)
        return ((end - span.stop + span.start, span) for span, end in zip(self.spans, ends, strict=True))


def pack(rows: Sequence[Row], part: BatchSlice, *, length: int, reset_at_documents: bool) -> Batch:
    """A part of the packed row in which `rows`, of `length` tokens each, lie end to end.

    Only this part's tokens are read; of the others, the places where documents start.
    """
    offsets = even_offsets(len(rows) * length, part.parts)
    own = part.tokens(offsets)
    first, last = own.start, own.stop
    tokens = np.full(last - first, rows[0].stream.tokenizer.end, dtype=np.int64)
    labels = np.full(last - first, IGNORED, dtype=np.int64)
    for number in range(first // length, -(-last // length)):
        for place, span in rows[number].places():
            place += number * length
            low, high = max(first, place), min(last, place + span.stop - span.start)
            if low < high:
                held = slice(low - first, high - first)
                start = span.start + low - place
                tokens[held], labels[held] = _read(rows[number].stream, start, start + high - low)
    return Batch(
        tokens=torch.from_numpy(tokens)[None],
        labels=torch.from_numpy(labels)[None],
        offsets=offsets,
        cu_seqlens=_boundaries(rows, length, reset_at_documents=reset_at_documents),
    )


def _read(stream: TokenStream, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens at `start <= position < stop`, and their labels."""
    # One token more: it is the label of the last.
    held = min(stop + 1, stream.tokens)
    ids = stream.read(start, held)
    labels = np.full(stop - start, IGNORED, dtype=np.int64)
    labels[: held - start - 1] = ids[1:]
    # A document's first token follows on nothing.
    labels[stream.starts(start + 1, held) - start - 1] = IGNORED
    labels[: held - start - 1][~stream.counted(start + 1, held)] = IGNORED
    return ids[: stop - start], labels


def _boundaries(rows: Sequence[Row], length: int, *, reset_at_documents: bool) -> Tensor:
    """The boundaries of the whole packed row: where rows start and, if they reset the state, documents."""
    boundaries = [0]
    for number, row in enumerate(rows):
        begin, end = number * length, (number + 1) * length
        if reset_at_documents:
            for place, (start, stop) in row.places():
                # Where a span ends, the next or the padding starts: a document of its own.
                inner = row.stream.starts(start + 1, stop) - start
                boundaries.extend(begin + place + at for at in (*inner.tolist(), stop - start) if place + at < length)
        boundaries.append(end)
    return torch.tensor(boundaries, dtype=torch.int32)


@dataclass(frozen=True)
class Batches:
    """Training batches: each holds the next `batch_size` rows of a packing, all ranks together."""

    packing: Packing
    _: KW_ONLY
    batch_size: int
    # Whether a document's start clears the state of every layer.
    reset_at_documents: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"train.batch_size={self.batch_size}: at least 1 is needed")

    def at(self, index: int, part: BatchSlice = WHOLE_BATCH) -> Batch:
        """A slice of batch `index`, from 0 on. All slices together are the same however many there are."""
        rows = [self.row(index * self.batch_size + number) for number in part.rows(self.batch_size)]
        return pack(rows, part, length=self.packing.length, reset_at_documents=self.reset_at_documents)

    def row(self, number: int) -> Row:
        """The row `number`, counted over all batches."""
        return Row(self.packing.stream, self.packing.spans(*self.packing.locate(number)))


@dataclass(frozen=True)
class EvaluationBatches(Batches):
    """One epoch of a packing in batches of one size; rows beyond the last are padding.

    Every document's tokens but the first are predicted exactly once, so over all batches the sum of `text_bytes` is
    `stream.predicted_bytes`, and bits per byte = nats / ln 2 / bytes. `len()` is the number of batches, the same on
    every rank. `limit`: at most so many rows, spread evenly over the epoch; 0 takes all.
    """

    _: KW_ONLY
    limit: int = 0

    @property
    def taken(self) -> int:
        rows = self.packing.rows(0)
        return min(self.limit or rows, rows)

    def __len__(self) -> int:
        return math.ceil(self.taken / self.batch_size)

    def text_bytes(self, batch: Batch) -> float:
        """Bytes of text that the labels of `batch` stand for; a document's end stands for none."""
        labels = batch.labels.cpu()
        counted = labels[labels != IGNORED]
        stream = self.packing.stream
        return stream.tokenizer.byte_count(counted) * stream.byte_scale

    def row(self, number: int) -> Row:
        """The row `number`, counted over all batches."""
        stream = self.packing.stream
        if number >= self.taken:
            return Row(stream, ())
        return Row(stream, self.packing.spans(0, number * self.packing.rows(0) // self.taken))
