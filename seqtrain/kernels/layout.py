"""How a batch of sequences becomes chunks that run together: one abstraction for plain rows and packed documents.

Every document is cut into chunks of C tokens, the last one padded. Documents are sorted by length, longest first, and
chunks are ordered by (step, document), step j being the documents' j-th chunks. So the chunks of one step lie side by
side, and the documents that take part in step j are always the first `counts[j]`:

    documents of 5, 3 and 2 chunks    step 0   1   2   3 4         carry (one state per document, sorted)
                                      [abc] [abc] [ab] [a] [a]     step j reads and writes carry[:counts[j]]

A recurrence over chunks then takes as many steps as the longest document has chunks, each on one contiguous slice.
Everything that needs no incoming state runs batched over the chunks of a `Segment`, a run of steps short enough to keep
temporaries small. Plain `[B,T]` input is B documents of length T: one step is one time slice of the batch.

`chunk_form` shows how it is used. Padding comes as zeros, which every recurrence here takes as the identity: no key, no
value, log decay 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.documents import boundaries_of


@dataclass(frozen=True)
class _Rows:
    """Where the (chunk, head, row) triples of a segment lie among the (token, head) pairs of a batch."""

    index: Tensor  # int64 [chunks*H*C], token*H + head; 0 for padding
    padding: Tensor | None  # int64, the positions of `index` that are padding; None where there are none
    filled: Tensor | None  # int64, the other positions; None where there is no padding
    target: Tensor  # int64, index[filled]


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of steps. `counts[j]`: documents in its j-th step. `tokens`: int64 `[chunks, C]`, -1 for padding."""

    counts: tuple[int, ...]
    tokens: Tensor
    _rows: dict[int, _Rows] = field(default_factory=dict, repr=False)

    @property
    def chunks(self) -> int:
        return self.tokens.shape[0]

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x: [B,T,H,...]` -> this segment's `[chunks*H, C, ...]` in `dtype`, a copy with zeros for padding.

        `x` should be contiguous: otherwise all of it is copied for every segment.
        """
        where = self._rows_for(x.shape[2])
        # Embedding look-up is PyTorch's fastest gather of rows on CPU (6 times index_select, as fast as a copy).
        rows = F.embedding(where.index, x.reshape(x.shape[:3].numel(), -1)).to(dtype)
        if where.padding is not None:
            rows.index_fill_(0, where.padding, 0)
        return rows.view(-1, self.tokens.shape[1], *x.shape[3:])

    def put(self, out: Tensor, rows: Tensor) -> None:
        """Writes `rows: [chunks*H, C, ...]` to this segment's tokens of the contiguous `out: [B,T,H,...]`."""
        where = self._rows_for(out.shape[2])
        rows = rows.reshape(where.index.shape[0], -1).to(out.dtype)
        if where.filled is not None:
            rows = F.embedding(where.filled, rows)
        out.view(-1, rows.shape[1]).index_copy_(0, where.target, rows)

    def steps(self, heads: int) -> list[tuple[slice, int]]:
        """For each step, the slice of `chunks*heads` rows it covers and the number of carried states it updates."""
        result, start = [], 0
        for count in self.counts:
            result.append((slice(start * heads, (start + count) * heads), count * heads))
            start += count
        return result

    def _rows_for(self, heads: int) -> _Rows:
        if heads not in self._rows:
            # A tensor born in inference mode could not take part in training later.
            with torch.inference_mode(False):
                self._rows[heads] = self._find_rows(heads)
        return self._rows[heads]

    def _find_rows(self, heads: int) -> _Rows:
        head = torch.arange(heads, device=self.tokens.device)[:, None]
        index = (self.tokens[:, None] * heads + head).flatten()  # chunks H C
        absent = (self.tokens < 0)[:, None].expand(-1, heads, -1).flatten()
        padding = absent.nonzero().flatten()
        if padding.numel() == 0:
            return _Rows(index, None, None, index)
        filled = (~absent).nonzero().flatten()
        return _Rows(index.clamp_(min=0), padding, filled, index[filled])


@dataclass(frozen=True, eq=False)
class ChunkLayout:
    """The chunks of a batch; see the module's text. Made by `chunk_layout`, which caches."""

    chunk: int
    starts: tuple[int, ...]  # each document's first token in the flattened batch, longest document first
    lengths: tuple[int, ...]  # in tokens, never rising
    order: tuple[int, ...]  # order[i]: the document that is i-th longest
    device: torch.device
    _segments: dict[int, tuple[Segment, ...]] = field(default_factory=dict, repr=False)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Documents that take part in each step; never rising."""
        chunks = [-(-length // self.chunk) for length in self.lengths]
        counts, active = [], len(chunks)
        for step in range(chunks[0] if chunks else 0):
            while chunks[active - 1] <= step:
                active -= 1
            counts.append(active)
        return tuple(counts)

    def sort_states(self, states: Tensor) -> Tensor:
        """`[N, ...]` in document order -> a contiguous copy in this layout's order."""
        return states[self._order].contiguous() if self._sorted else states.clone(memory_format=torch.contiguous_format)

    def restore_states(self, states: Tensor) -> Tensor:
        """The inverse of `sort_states`."""
        return torch.empty_like(states).index_copy_(0, self._order, states) if self._sorted else states

    def segments(self, limit: int) -> tuple[Segment, ...]:
        """All chunks in order, in runs of whole steps of at most `limit` chunks (a single step may exceed it)."""
        if limit not in self._segments:
            with torch.inference_mode(False):
                self._segments[limit] = tuple(self._cut(limit))
        return self._segments[limit]

    @cached_property
    def _sorted(self) -> bool:
        return self.order != tuple(range(len(self.order)))

    @cached_property
    def _order(self) -> Tensor:
        with torch.inference_mode(False):
            return torch.tensor(self.order, dtype=torch.int64, device=self.device)

    def _cut(self, limit: int) -> Iterator[Segment]:
        starts = torch.tensor(self.starts, dtype=torch.int64)
        ends = starts + torch.tensor(self.lengths, dtype=torch.int64)
        row = torch.arange(self.chunk)
        first = 0
        while first < len(self.counts):
            last, chunks = first + 1, self.counts[first]
            while last < len(self.counts) and chunks + self.counts[last] <= limit:
                chunks += self.counts[last]
                last += 1
            counts = self.counts[first:last]
            repeats = torch.tensor(counts)
            step = torch.arange(first, last).repeat_interleave(repeats)
            document = torch.arange(chunks) - (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
            tokens = (starts[document] + step * self.chunk)[:, None] + row
            tokens = torch.where(tokens < ends[document][:, None], tokens, -1)
            yield Segment(counts, tokens.to(self.device))
            first = last


def chunk_layout(
    batch: int, tokens: int, cu_seqlens: Tensor | None, *, chunk: int, device: torch.device, smallest_chunk: int = 16
) -> ChunkLayout:
    """The layout of `[batch, tokens]`, or of the documents of one row with boundaries `cu_seqlens`, int `[N+1]`.

    `chunk`: chunk length for long documents, a power of two. It is halved, down to `smallest_chunk`, where documents
    are so short that padding would outweigh what larger chunks save. Layouts are cached by their boundaries.
    """
    boundaries = None if cu_seqlens is None else boundaries_of(cu_seqlens)
    return _chunk_layout(batch, tokens, boundaries, chunk, smallest_chunk, device)


# A training step meets one set of boundaries in all its layers, forward and backward; a few more for evaluation.
@lru_cache(maxsize=8)
def _chunk_layout(
    batch: int, tokens: int, boundaries: tuple[int, ...] | None, chunk: int, smallest_chunk: int, device: torch.device
) -> ChunkLayout:
    if boundaries is None:
        starts = [row * tokens for row in range(batch)]
        lengths = [tokens] * batch
    else:
        starts = list(boundaries[:-1])
        lengths = [end - start for start, end in pairwise(boundaries)]
    while chunk > smallest_chunk and _padded(lengths, chunk) > 1.25 * _padded(lengths, chunk // 2):
        chunk //= 2
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    return ChunkLayout(chunk, tuple(starts[n] for n in order), tuple(lengths[n] for n in order), tuple(order), device)


def _padded(lengths: list[int], chunk: int) -> int:
    return sum(-(-length // chunk) * chunk for length in lengths)
