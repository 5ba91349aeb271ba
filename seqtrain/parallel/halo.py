"""What lies to the left of a rank: the last tokens before its own, or its document's first, from whoever holds them.

Positions count the row's tokens from 0; rows of a state that precede the row have negative positions and lie on the
group's first rank, before its tokens. Every rank knows all `offsets` and document boundaries, so it knows what each
other rank wants, and nothing but the tokens travels.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from seqtrain.kernels.segments import PastInputs
from seqtrain.parallel.exchange import exchange
from seqtrain.parallel.scan import keep_in_graph
from seqtrain.parallel.sequence import Call, SplitInTime, splits


@dataclass(frozen=True)
class RowRange:
    """Rows `first ... last` of a rank's tensor, those of a given state included, that go to or come from `rank`."""

    rank: int
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class HaloPlan:
    """Which rows each rank of a group wants from earlier ones.

    Rank r wants positions `starts[r] ... ends[r]`, all before its own; `given` rows of a state lie before position 0.
    `ends`: empty where everybody wants the positions up to its own.
    """

    starts: tuple[int, ...]
    offsets: tuple[int, ...]
    given: int = 0
    ends: tuple[int, ...] = ()
    # All of it in words, on which ranks agree.
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.ends:
            object.__setattr__(self, "ends", self.offsets[:-1])
        # `torch.compile` can't write a dataclass, nor a tuple, into a text.
        object.__setattr__(self, "text", f"{self.starts} {self.ends} {self.offsets} {self.given}")

    @property
    def any(self) -> bool:
        """Whether any rank wants anything."""
        return self.starts != self.ends

    def before(self, rank: int) -> int:
        """How many rows `rank` wants."""
        return self.ends[rank] - self.starts[rank]

    def wanted(self, receiver: int, sender: int) -> RowRange | None:
        """Rows of `sender` that `receiver` wants; their `rank` is the sender's."""
        lowest = self.offsets[sender] - (self.given if sender == 0 else 0)
        first = max(self.starts[receiver], lowest)
        last = min(self.ends[receiver], self.offsets[sender + 1])
        return RowRange(sender, first - lowest, last - lowest) if last > first and sender <= receiver else None


# A step meets the same plan in every layer of a kind.
@lru_cache(maxsize=64)
def _traffic(plan: HaloPlan, rank: int) -> tuple[tuple[RowRange, ...], tuple[RowRange, ...]]:
    """Rows of `rank` that others want, and itself where it holds the given state; those of others that it wants."""
    others = range(rank, len(plan.starts))
    sends = ((other, plan.wanted(other, rank)) for other in others)
    receives = (plan.wanted(rank, other) for other in range(rank + 1))
    return (
        tuple(RowRange(other, rows.first, rows.last) for other, rows in sends if rows is not None),
        tuple(rows for rows in receives if rows is not None),
    )


@lru_cache(maxsize=64)
def _tokens_before(offsets: tuple[int, ...], boundaries: tuple[int, ...], count: int, given: int) -> HaloPlan:
    starts = [
        max(document or -given, start - count)
        for start, document in zip(offsets, _first_documents(offsets, boundaries), strict=False)
    ]
    return HaloPlan(tuple(starts), offsets, given)


@lru_cache(maxsize=64)
def _first_tokens(offsets: tuple[int, ...], boundaries: tuple[int, ...], count: int, given: int) -> HaloPlan:
    documents = _first_documents(offsets, boundaries)
    starts = tuple(document or -given for document in documents)
    ends = tuple(min(document + count, start) for start, document in zip(offsets, documents, strict=False))
    return HaloPlan(starts, offsets, given, ends)


def _first_documents(offsets: tuple[int, ...], boundaries: tuple[int, ...]) -> list[int]:
    """Where the document of each rank's first token starts; of a rank without tokens, of the token before it."""
    firsts = [start if end > start else start - 1 for start, end in pairwise(offsets)]
    return [boundaries[bisect_right(boundaries, first) - 1] if first > 0 else 0 for first in firsts]


@dataclass(frozen=True)
class ShardedRow:
    """A row of tokens of which rank r of `group` holds `offsets[r] ... offsets[r+1]`.

    `offsets`: `P + 1` rising numbers from 0 to the row's length. `cu_seqlens`: int `[N+1]`, boundaries of the whole
    row's documents, or None for one document (or B rows of one each).
    """

    group: dist.ProcessGroup
    offsets: tuple[int, ...]
    cu_seqlens: Tensor | None = None
    # Boundaries of the documents that have tokens, on the host: from 0 to the row's length.
    boundaries: tuple[int, ...] = field(init=False)
    # Boundaries of the parts of documents that this rank holds, counted from its first token: at least two.
    own_boundaries: tuple[int, ...] = field(init=False)
    # Where in the row this rank's first document starts; for a rank without tokens, see `before`.
    document_start: int = field(init=False)

    @property
    def rank(self) -> int:
        return self.group.rank()

    def __post_init__(self) -> None:
        ranks, offsets = self.group.size(), self.offsets
        if len(offsets) != ranks + 1 or offsets[0] != 0 or any(a > b for a, b in pairwise(offsets)):
            raise ValueError(
                f"offsets={offsets}: expected {ranks + 1} rising numbers from 0, the boundaries of {ranks} ranks"
            )
        if self.cu_seqlens is not None and int(self.cu_seqlens[-1]) != offsets[-1]:
            raise ValueError(f"offsets={offsets}: expected to end at {int(self.cu_seqlens[-1])}, where cu_seqlens does")
        # Found once and not when asked for: `torch.compile` can't trace a cached property.
        tokens, start, end = self.offsets[-1], self.offsets[self.rank], self.offsets[self.rank + 1]
        inner = set() if self.cu_seqlens is None else set(self.cu_seqlens.tolist())
        boundaries = (0, *sorted(inner - {0, tokens}), tokens)
        object.__setattr__(self, "boundaries", boundaries)
        own = (0, *(boundary - start for boundary in boundaries if start < boundary < end), end - start)
        object.__setattr__(self, "own_boundaries", own)
        object.__setattr__(self, "document_start", _first_documents(self.offsets, boundaries)[self.rank])

    def own_documents(self, past: Any) -> tuple[Tensor | None, Any]:
        """`cu_seqlens` of this rank's parts of documents, None for whole rows, and `past` as the state of all of them.

        `past`: tensors `[1,...]` of the first one; documents that start here have no past, zeros.
        """
        if self.cu_seqlens is None:
            return None, past
        documents = len(self.own_boundaries) - 1

        def padded(part: Tensor) -> Tensor:
            return F.pad(part, (*(0, 0) * (part.dim() - 1), 0, documents - 1))

        local = torch.tensor(self.own_boundaries, dtype=torch.int32, device=tree_leaves(past)[0].device)
        return local, tree_map(padded, past)

    def before(self, count: int, *, given: int = 0) -> HaloPlan:
        """Each rank wants the last `count` positions before its tokens, as far as its first document reaches back.

        The `given` rows belong to the row's first document. A rank without tokens continues the document of the
        token before it, so that the state after its last token is that of the rank before.
        """
        return _tokens_before(self.offsets, self.boundaries, count, given)

    def first_of_document(self, count: int, *, given: int = 0) -> HaloPlan:
        """Each rank wants the first `count` positions of its first document, those before its own tokens.

        The `given` rows belong to the row's first document and come before its tokens. For a rank without tokens, see
        `before`.
        """
        return _first_tokens(self.offsets, self.boundaries, count, given)


def left_halo(x: Tensor, plan: HaloPlan, *, group: dist.ProcessGroup) -> Tensor:
    """The rows that this rank wants: `[B, rows, ...]`, in order of position; differentiable.

    `x`: `[B,T_r,...]`, this rank's tokens, on the group's first rank after the given rows, the same `...` and dtype on
    all. Gradients go back to the rank the rows came from. Every rank of `group` calls, in the same order, and its loss
    must depend on the result: see `keep_in_graph`.
    Bytes: a rank receives its rows, forward, and sends as many back; a rank sends each row as often as it is wanted.
    """
    rank, ranks = group.rank(), group.size()
    if not plan.any:
        return x[:, :0]
    sends, receives = _traffic(plan, rank)
    earliest = min([x.shape[1], *(rows.first for rows in sends)])
    # One slice, so that autograd fills one gradient of x's size and not one a receiver.
    tail = x[:, earliest:]
    pieces = [tail[:, rows.first - earliest : rows.last - earliest].reshape(-1) for rows in sends]
    row = x.shape[0] * x.shape[2:].numel()
    came = exchange(
        torch.cat(pieces) if pieces else tail.reshape(-1),
        _sizes(sends, row, ranks),
        _sizes(receives, row, ranks),
        group=group,
        agreed=f"halo {plan.text} {row}",
        run_ahead=True,
    )
    blocks = [
        piece.view(x.shape[0], rows.count, *x.shape[2:])
        for piece, rows in zip(came.split([rows.count * row for rows in receives] or [0]), receives, strict=False)
    ]
    return torch.cat(blocks, 1) if blocks else came.view(x.shape[0], 0, *x.shape[2:])


def _sizes(messages: Sequence[RowRange], row: int, ranks: int) -> list[int]:
    sizes = [0] * ranks
    for rows in messages:
        sizes[rows.rank] = rows.count * row
    return sizes


def past_inputs(x: Tensor, count: int, *, row: ShardedRow, initial_state: Tensor | None = None) -> Tensor:
    """`[B, count, ...]`: the last inputs before this rank's first token, zeros where its document has fewer.

    `x`: `[B,T_r,...]`, this rank's tokens. `initial_state`: `[B,count,...]`, the inputs before the whole row, oldest
    first; given on every rank or on none, read on the group's first.
    Bytes: at most `count` tokens received a rank, and as many gradients sent back.
    """
    plan = row.before(count, given=0 if initial_state is None else count)
    if initial_state is not None and row.rank == 0:
        x = torch.cat([initial_state.to(x.dtype), x], 1)
    halo = left_halo(x, plan, group=row.group)
    missing = count - halo.shape[1]
    return torch.cat([halo.new_zeros(halo.shape[0], missing, *halo.shape[2:]), halo], 1) if missing else halo


@splits(PastInputs)
class PastInputsHalo(SplitInTime):
    """The state is the last rows of the operator's first tensor: they come from the left, the operator continues."""

    def sharded(self, sequence: Any, call: Call) -> tuple[Tensor, Tensor]:
        initial, count = call.initial_state, call.operator.time.count(call.tensors, call.options)
        past = past_inputs(call.tensors[0], count, row=sequence.row, initial_state=initial)
        local, state = sequence.row.own_documents(past)
        out, states = call.run(sequence, state, local)
        # Ranks that don't read the initial state give it a zero gradient.
        out = keep_in_graph(out, past) if initial is None else keep_in_graph(out, past, initial)
        return out, states if local is None else states[-1:]
