"""Rows of tokens as packed batches: what a step reads follows from the seed and its number alone."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import accumulate, islice, pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from seqtrain.data.masking import Masking
from seqtrain.data.packing import Packing, Span
from seqtrain.data.stream import TokenStream
from seqtrain.errors import ConfigError

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end in one packed row of n tokens, or what a rank reads of that row.

    `tokens`, `labels`: int64 `[1, ...]`, those of one part, or of one in each segment of the row, end to end; a label
    is the token that follows in the same document, here or elsewhere, -100 where none does.
    `offsets`: where the parts start in the row, segment by segment, and n. `cu_seqlens`: int32 `[N+1]` on the CPU, from
    0 to n, the same for every part: a boundary where one of the rows starts and, unless switched off, a document.
    `sources`: which of the sources of a mixture each row is from.
    """

    tokens: Tensor
    labels: Tensor
    offsets: tuple[int, ...]
    cu_seqlens: Tensor
    sources: tuple[int, ...] = ()

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
    # Pieces of the packed row that run one after the other; the ranks divide each.
    segments: int = 1
    # Whether some may have a row less than others; who has none reads a row without labels.
    uneven: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.ranks, self
        assert 0 <= self.micro_batch < self.micro_batches, self
        assert 0 <= self.part < self.parts, self

    def rows(self, batch_size: int) -> range:
        """Which of a batch's rows they are. Raises `ConfigError` if they don't come out even."""
        slices = self.ranks * self.micro_batches
        if self.uneven:
            offsets, number = even_offsets(batch_size, slices), self.micro_batch * self.ranks + self.rank
            return range(offsets[number], offsets[number + 1])
        if batch_size % slices:
            raise ConfigError(
                f"train.batch_size={batch_size}: must be a multiple of data-parallel ranks x micro-batches "
                f"= {self.ranks} x {self.micro_batches}; use {math.ceil(batch_size / slices) * slices}"
            )
        size = batch_size // slices
        first = (self.micro_batch * self.ranks + self.rank) * size
        return range(first, first + size)

    def offsets(self, tokens: int) -> tuple[int, ...]:
        """Where the parts of a packed row of so many tokens start, and its end."""
        return even_offsets(tokens, self.parts * self.segments)


WHOLE_BATCH = BatchSlice()


def places_of(offsets: Sequence[int], part: int, parts: int) -> list[range]:
    """The places in a row that part `part` of `parts` holds, a stretch a segment; `offsets`: as those of a `Batch`."""
    if parts == 1:
        return [range(offsets[-1])]
    return [range(*pair) for pair in islice(pairwise(offsets), part, None, parts)]


def even_offsets(tokens: int, parts: int) -> tuple[int, ...]:
    """Boundaries of `parts` pieces of `tokens` whose lengths differ by one at most: `parts + 1` numbers from 0."""
    return tuple(tokens * part // parts for part in range(parts + 1))


class Row:
    """What one row holds, by positions in whatever it is taken from."""

    # Whether it may be cut into shorter sequences.
    divisible: ClassVar[bool] = True

    def places(self) -> Iterable[tuple[int, Span]]:
        """The stretches that lie in it, each with its place in the row; the rest is padding."""
        raise NotImplementedError

    def starts(self, start: int, stop: int) -> np.ndarray:
        """int64: the positions `start <= position < stop` at which a document starts, rising."""
        raise NotImplementedError

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 `[stop - start]` each: the tokens at `start <= position < stop`, and their labels."""
        raise NotImplementedError


@dataclass(frozen=True)
class StreamRow(Row):
    """Spans of a stream laid end to end, and padding after them."""

    stream: TokenStream
    spans: Sequence[Span]
    # Where an encoder is asked for tokens; and the row's number.
    masking: Masking | None = None
    number: int = 0

    def places(self) -> Iterable[tuple[int, Span]]:
        ends = accumulate(span.stop - span.start for span in self.spans)
        return ((end - span.stop + span.start, span) for span, end in zip(self.spans, ends, strict=True))

    def starts(self, start: int, stop: int) -> np.ndarray:
        return self.stream.starts(start, stop)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        # One token more: it is the label of the last.
        held = min(stop + 1, self.stream.tokens)
        ids = self.stream.read(start, held)
        labels = np.full(stop - start, IGNORED, dtype=np.int64)
        labels[: held - start - 1] = ids[1:]
        # A document's first token follows on nothing.
        labels[self.stream.starts(start + 1, held) - start - 1] = IGNORED
        labels[: held - start - 1][~self.stream.counted(start + 1, held)] = IGNORED
        if self.masking is None:
            return ids[: stop - start], labels
        own = ids[: stop - start]
        shown, asked = self.masking.asked(own, start, self.number)
        return shown, np.where(asked, own, IGNORED)


@dataclass(frozen=True)
class Layout:
    """How rows of `length` tokens are laid end to end."""

    length: int
    # The id of what fills a row that is not full.
    padding: int
    # Whether a document's start clears the state of every layer.
    reset_at_documents: bool = True
    # `(step, length)`: lengths of the sequences into which rows are cut from that step on; none: rows stay whole.
    lengths: Sequence[tuple[int, int]] = ()

    def sequence_length(self, step: int) -> int:
        """The length of the sequences in a row at `step`."""
        return next((length for first, length in reversed(self.lengths) if first <= step), self.length)


def pack(rows: Sequence[Row], part: BatchSlice, layout: Layout, *, step: int = 0) -> Batch:
    """A part of the packed row in which `rows` lie end to end.

    Only this part's tokens are read; of the others, the places where documents start.
    """
    length = layout.length
    offsets = part.offsets(len(rows) * length)
    held = [_read(rows, places, layout) for places in places_of(offsets, part.part, part.parts)]
    tokens, labels = held[0] if len(held) == 1 else map(np.concatenate, zip(*held, strict=True))
    return Batch(
        tokens=torch.from_numpy(tokens)[None],
        labels=torch.from_numpy(labels)[None],
        offsets=offsets,
        cu_seqlens=_boundaries(rows, layout, step),
    )


def _read(rows: Sequence[Row], places: range, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """int64 `[len(places)]` each: tokens and labels at these places of the packed row."""
    first, last, length = places.start, places.stop, layout.length
    tokens = np.full(last - first, layout.padding, dtype=np.int64)
    labels = np.full(last - first, IGNORED, dtype=np.int64)
    for number in range(first // length, -(-last // length)):
        for place, span in rows[number].places():
            place += number * length
            low, high = max(first, place), min(last, place + span.stop - span.start)
            if low < high:
                held = slice(low - first, high - first)
                start = span.start + low - place
                tokens[held], labels[held] = rows[number].read(start, start + high - low)
    return tokens, labels


def _boundaries(rows: Sequence[Row], layout: Layout, step: int) -> Tensor:
    """The boundaries of the whole packed row: where sequences start and, if they reset the state, documents."""
    length, boundaries = layout.length, [0]
    for number, row in enumerate(rows):
        begin, end = number * length, (number + 1) * length
        inside: list[int] = []
        if layout.reset_at_documents:
            for place, (start, stop) in row.places():
                # Where a span ends, the next or the padding starts: a document of its own.
                inner = row.starts(start + 1, stop) - start
                inside.extend(place + at for at in (*inner.tolist(), stop - start) if place + at < length)
        if row.divisible and (shorter := layout.sequence_length(step)) < length:
            inside = sorted({*inside, *range(shorter, length, shorter)})
        boundaries.extend(begin + at for at in inside)
        boundaries.append(end)
    return torch.tensor(boundaries, dtype=torch.int32)


class RowBatches:
    """Base of what gives batches of `batch_size` rows, all ranks together, one after the other."""

    batch_size: int

    @property
    def layout(self) -> Layout:
        """How its rows are laid end to end."""
        raise NotImplementedError

    def row(self, number: int) -> Row:
        """The row `number`, counted over all batches."""
        raise NotImplementedError

    def at(self, index: int, part: BatchSlice = WHOLE_BATCH) -> Batch:
        """A slice of batch `index`, from 0 on. All slices together are the same however many there are."""
        own = part.rows(self.batch_size)
        rows = [self.row(index * self.batch_size + number) for number in own or range(1)]
        batch = pack(rows, part, self.layout, step=index)
        return batch if own else replace(batch, labels=torch.full_like(batch.labels, IGNORED))

    def epochs(self, batches: int) -> dict[str, float]:
        """Of a mixture, how often the text of each source has been read after so many batches, by `epochs/NAME`."""
        return {}


@dataclass(frozen=True)
class Batches(RowBatches):
    """Training batches: each holds the next `batch_size` rows of a packing."""

    packing: Packing
    _: KW_ONLY
    batch_size: int
    # As those of a `Layout`.
    reset_at_documents: bool = True
    lengths: Sequence[tuple[int, int]] = ()
    masking: Masking | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"train.batch_size={self.batch_size}: at least 1 is needed")

    @property
    def layout(self) -> Layout:
        end = self.packing.stream.tokenizer.end
        return Layout(self.packing.length, end, self.reset_at_documents, self.lengths)

    def row(self, number: int) -> StreamRow:
        return StreamRow(self.packing.stream, self.packing.spans(*self.packing.locate(number)), self.masking, number)

    def epochs_of(self, rows: int) -> float:
        """How often the stream has been read when `rows` rows have."""
        epoch, row = self.packing.locate(rows)
        return epoch + row / self.packing.rows(epoch)


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

    def row(self, number: int) -> StreamRow:
        stream = self.packing.stream
        if number >= self.taken:
            return StreamRow(stream, ())
        spans = self.packing.spans(0, number * self.packing.rows(0) // self.taken)
        return StreamRow(stream, spans, self.masking, number)
