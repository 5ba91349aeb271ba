"""What lies to the left of a rank: the last tokens before its own, or its document's first, from whoever holds them.

Positions count the row's tokens from 0; rows of a state that precede the row have negative positions and lie on the
group's first rank, before its tokens. Every rank knows all `offsets` and document boundaries, so it knows what each
other rank wants, and nothing but the tokens travels.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.kernels.segments import PastInputs
from seqtrain.parallel.exchange import exchange
from seqtrain.parallel.scan import keep_in_graph
from seqtrain.parallel.sequence import Call, SplitInTime, splits

if TYPE_CHECKING:
    from seqtrain.parallel.sharded import ShardedSequence


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
    leaving = tuple(RowRange(other, rows.first, rows.last) for other, rows in sends if rows is not None)
    return leaving, tuple(rows for rows in receives if rows is not None)


def tokens_before(offsets: tuple[int, ...], boundaries: tuple[int, ...], count: int, given: int) -> HaloPlan:
    """See `ShardedSequence.before`."""
    starts = [
        max(document or -given, start - count)
        for start, document in zip(offsets, first_documents(offsets, boundaries), strict=False)
    ]
    return HaloPlan(tuple(starts), offsets, given)


def first_tokens(offsets: tuple[int, ...], boundaries: tuple[int, ...], count: int, given: int) -> HaloPlan:
    """See `ShardedSequence.first_of_document`."""
    documents = first_documents(offsets, boundaries)
    starts = tuple(document or -given for document in documents)
    ends = tuple(min(document + count, start) for start, document in zip(offsets, documents, strict=False))
    return HaloPlan(starts, offsets, given, ends)


def first_documents(offsets: tuple[int, ...], boundaries: tuple[int, ...]) -> list[int]:
    """Where the document of each rank's first token starts; of a rank without tokens, of the token before it."""
    firsts = [start if end > start else start - 1 for start, end in pairwise(offsets)]
    return [boundaries[bisect_right(boundaries, first) - 1] if first > 0 else 0 for first in firsts]


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
    sizes = [[0] * ranks, [0] * ranks]
    for size, messages in zip(sizes, (sends, receives), strict=True):
        for rows in messages:
            size[rows.rank] = rows.count * row
    leaving = torch.cat(pieces) if pieces else tail.reshape(-1)
    came = exchange(leaving, *sizes, group=group, agreed=f"halo {plan.text} {row}", run_ahead=True)
    blocks = [
        piece.view(x.shape[0], rows.count, *x.shape[2:])
        for piece, rows in zip(came.split([rows.count * row for rows in receives] or [0]), receives, strict=False)
    ]
    return torch.cat(blocks, 1) if blocks else came.view(x.shape[0], 0, *x.shape[2:])


def past_inputs(x: Tensor, count: int, sequence: "ShardedSequence", initial_state: Tensor | None = None) -> Tensor:
    """`[B, count, ...]`: the last inputs before this rank's first token, zeros where its document has fewer.

    `x`: `[B,T_r,...]`, this rank's tokens. `initial_state`: `[B,count,...]`, the inputs before the whole row, oldest
    first; given on every rank or on none, read on the group's first.
    Bytes: at most `count` tokens received a rank, and as many gradients sent back.
    """
    plan = sequence.before(count, given=0 if initial_state is None else count)
    if initial_state is not None and sequence.rank == 0:
        x = torch.cat([initial_state.to(x.dtype), x], 1)
    halo = left_halo(x, plan, group=sequence.group)
    missing = count - halo.shape[1]
    return torch.cat([halo.new_zeros(halo.shape[0], missing, *halo.shape[2:]), halo], 1) if missing else halo


@splits(PastInputs)
class PastInputsHalo(SplitInTime):
    """The state is the last rows of the operator's first tensor: they come from the left, the operator continues."""

    def sharded(self, sequence: "ShardedSequence", call: Call) -> tuple[Tensor, Tensor]:
        initial, count = call.initial_state, call.operator.time.count(call.tensors, call.options)
        past = past_inputs(call.tensors[0], count, sequence, initial)
        local, state = sequence.own_documents(past)
        out, states = call.run(sequence, state, local)
        return keep_in_graph(out, past), states if local is None else states[-1:]
