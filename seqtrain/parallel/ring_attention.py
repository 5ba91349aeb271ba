"""Causal softmax attention of a sharded row in two dimensions: heads within groups of ranks, a ring of the groups.

Each rank gets the tokens of its group for its share of heads (`attention_layout`), attends to what documents it holds
whole, and to those that go around: a group's keys and values pass from neighbour to neighbour, the next block under way
while one is computed on, and partial results are merged by their log-sum-exp. Outputs go back to where the tokens are.

Nothing that was received is kept. Backward sends queries, keys and values again, with the output and its gradient; a
block's gradients go around with it and home from the last group that wants it. So a rank keeps its own tokens'
q, k, v, out, and a log-sum-exp for each of its queries, whatever the number of ranks. As PyTorch operators: they
compile, differentiate, and activation checkpointing saves the output and the log-sum-exp, no message.
"""

import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.softmax_attention.blocks import Packed, attend, attend_gradients, merge, packed
from seqtrain.parallel.attention_layout import Layout, Rectangle, Round
from seqtrain.parallel.exchange import exchange
from seqtrain.parallel.scan import COMMUNICATE
from seqtrain.parallel.scan_engine import engine_of
from seqtrain.parallel.wires import ExchangeWire, Sent


class RankLayout:
    """A layout as one rank of it sees it, with what its passes need. Operators find it by its number while it lives."""

    def __init__(self, layout: Layout, rank: int):
        self.layout, self.rank, self.group = layout, rank, rank // layout.inner
        # What ranks agree on, in a few letters.
        self.text = f"{zlib.crc32(repr((layout.offsets, layout.inner, layout.spans, layout.given)).encode()):x}"
        _layouts[layout.number] = self
        self.tokens = sum(span.queries for span in layout.spans[self.group])

    @cached_property
    def shares(self) -> tuple["_Share", "_Share"]:
        """Which of this rank's rows go where, and how many come from whom: of queries, and of keys."""
        return _Share.of(self, 0), _Share.of(self, self.layout.given)

    @cached_property
    def own_work(self) -> tuple[Rectangle, ...]:
        """Of the group, with the keys of its own block."""
        return self.layout.own_work(self.group)

    @cached_property
    def rounds(self) -> list[Round]:
        """Of the group, after its own work."""
        return self.layout.rounds(self.group)

    @cached_property
    def first_block(self) -> tuple[slice, ...]:
        """Rows of the group's block that others want."""
        return self.layout.first_block(self.group)

    @cached_property
    def block(self) -> list[slice]:
        """Where the group's block is among its keys."""
        return self.layout.key_slices(self.group)

    @cached_property
    def whole(self) -> tuple[list[slice], list[slice], Packed] | None:
        """Places of queries and of keys in documents that this group holds whole, and those documents."""
        spans = self.layout.spans[self.group]

        def places(counts: Iterable[int]) -> list[slice]:
            each = zip(spans, pairwise(accumulate(counts, initial=0)), strict=True)
            return _joined(slice(*ends) for span, ends in each if not span.shared)

        lengths = [span.queries for span in spans if not span.shared]
        if not lengths:
            return None
        queries, keys = places(span.queries for span in spans), places(span.keys for span in spans)
        return queries, keys, packed((0, *accumulate(lengths)))

    @property
    def alone(self) -> bool:
        """Whether each document is whole on some group: nothing goes around."""
        return not (self.own_work or self.layout.farthest)


_layouts: weakref.WeakValueDictionary[int, RankLayout] = weakref.WeakValueDictionary()


def _joined(places: Iterable[slice]) -> list[slice]:
    found: list[slice] = []
    for place in places:
        first = found.pop().start if found and found[-1].stop == place.start else place.start
        found.append(slice(first, place.stop))
    return found


@dataclass
class _Share:
    """`order`: this rank's rows by the group that gets them, None where they are in order; `to`: how many each gets;
    `come`: how many this rank's group gets from each rank.
    """

    order: Tensor | None
    to: list[int]
    come: list[int]

    def ordered(self, x: Tensor) -> Tensor:
        """`[B,T_r,...]`: rows by the group that gets them."""
        return x if self.order is None else x.index_select(1, self._order_on(x.device))

    def restored(self, x: Tensor, rows: int) -> Tensor:
        """The reverse: `rows` of them, zeros where none went to a group."""
        if self.order is None:
            return x
        return x.new_zeros(x.shape[0], rows, *x.shape[2:]).index_copy(1, self._order_on(x.device), x)

    def _order_on(self, device: torch.device) -> Tensor:
        assert self.order is not None
        self.order = self.order.to(device)
        return self.order

    @classmethod
    def of(cls, place: RankLayout, given: int) -> "_Share":
        # Rows of a state are the first rank's.
        layout, bounds = place.layout, torch.tensor([-given, *place.layout.offsets[1:]])
        spans = [(span.start, span.end, group) for group, held in enumerate(layout.spans) for span in held]
        starts, ends, groups = torch.tensor(spans, dtype=torch.int64).view(-1, 3).unbind(1)
        start, end = bounds[place.rank : place.rank + 2].tolist()
        first = starts.clamp(min=start)
        counts = (ends.clamp(max=end) - first).clamp(min=0)
        to = counts.new_zeros(layout.outer).index_add(0, groups, counts)
        order = torch.repeat_interleave(first - start - counts.cumsum(0) + counts, counts)
        order += torch.arange(len(order))
        mine = groups == place.group
        low, high = (edges[mine][:, None] for edges in (starts, ends))
        come = (torch.minimum(high, bounds[1:]) - torch.maximum(low, bounds[:-1])).clamp(min=0).sum(0)
        ordered = len(order) == end - start and bool((order.diff() == 1).all())
        return cls(None if ordered else order, to.tolist(), come.tolist())


def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    cap: float = 0.0,
    fused: bool,
    place: RankLayout,
    group: dist.ProcessGroup,
) -> Tensor:
    """Causal attention within documents, `[B,T_r,H,V]` for this rank's tokens.

    Args:
        q, k, v: `[B,T_r,H,K]`, `[B,T_r,G,K]`, `[B,T_r,G,V]`, all of the rank's tokens, of one dtype; k and v on the
            group's first rank after the layout's given rows.
        scale, cap: the operator's `scale` and `score_cap`.
        fused: use a fused kernel where there is one.
        place: this rank's view of a layout that is the same on every rank.
        group: every rank of it calls; the loss of every rank must depend on the result, of no rows too.
    """
    numbers = (place.layout.number, place.tokens, place.layout.inner)
    return torch.ops.seqtrain.sharded_attention(q, k, v, scale, cap, fused, numbers, group.group_name)[0]


class _Rows:
    """Moves rows between where the tokens are and the groups that attend for them."""

    def __init__(self, place: RankLayout, group: dist.ProcessGroup, what: str):
        self._place, self._group, self._what = place, group, f"attention {what} {place.text}"
        self._inner, self._ranks = place.layout.inner, group.size()

    def to_groups(self, shares: Sequence[_Share], *xs: Tensor) -> list[Tensor]:
        """`[B,T_r,H,W]` -> `[B,T,H/inner,W]`, the group's tokens in order of position."""
        if not self._place.layout.moves:
            return list(xs)
        inner, batch = self._inner, xs[0].shape[0]
        heads = [(x.shape[2] // inner, x.shape[3]) for x in xs]
        pieces = [share.ordered(x).split(share.to, 1) for x, share in zip(xs, shares, strict=True)]
        leaving = [
            torch.cat([x.unflatten(2, (inner, -1)).movedim(2, 0).flatten(1) for x in piece], 1)
            for piece in zip(*pieces, strict=True)
        ]
        shapes = [
            [(batch, share.come[rank], *each) for share, each in zip(shares, heads, strict=True)]
            for rank in range(self._ranks)
        ]
        came = self._exchange(leaving, [[_size(shape) for shape in each] for each in shapes], xs[0], f"{heads}")
        parts = iter(came)
        found = [[next(parts).view(shape) for shape in each] for each in shapes]
        return [torch.cat(rows, 1) for rows in zip(*found, strict=True)]

    def to_ranks(self, shares: Sequence[_Share], *xs: Tensor, rows: Sequence[int]) -> list[Tensor]:
        """The reverse; `rows`: how many this rank has of each."""
        if not self._place.layout.moves:
            return list(xs)
        inner, batch = self._inner, xs[0].shape[0]
        pieces = [x.split(share.come, 1) for x, share in zip(xs, shares, strict=True)]
        leaving = [torch.cat([x.flatten() for x in piece])[None] for piece in zip(*pieces, strict=True)]
        heads = [tuple(x.shape[2:]) for x in xs]
        sizes = [[batch * share.to[rank // inner] * _size(each) for share, each in zip(shares, heads, strict=True)]
                 for rank in range(self._ranks)]  # fmt: skip
        came = self._exchange(leaving, sizes, xs[0], f"{heads} back")
        found: list[Tensor] = []
        for which, (share, each, count) in enumerate(zip(shares, heads, rows, strict=True)):
            mine = came[which :: len(xs)]
            parts = [
                torch.stack(mine[first : first + inner]).view(inner, batch, share.to[first // inner], *each)
                for first in range(0, self._ranks, inner)
            ]
            x = torch.cat([part.movedim(0, 2).flatten(2, 3) for part in parts], 1)
            found.append(share.restored(x, count))
        return found

    def _exchange(self, leaving: Sequence[Tensor], sizes: list[list[int]], like: Tensor, what: str) -> list[Tensor]:
        """`leaving`: by receiver, or by group of them a row for each; `sizes`: by sender of its tensors."""
        to = [row.numel() for x in leaving for row in x]
        came = exchange(
            torch.cat([x.flatten() for x in leaving]),
            to,
            [sum(each) for each in sizes],
            group=self._group,
            agreed=f"{self._what} {like.shape[0]} {what}",
        )
        return list(came.split([size for each in sizes for size in each]))


def _size(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _taken(x: Tensor, places: Sequence[slice]) -> Tensor:
    """Rows of `[B,T,...]` at these places, in memory one after the other."""
    if len(places) == 1:
        return x[:, places[0]].contiguous()
    return torch.cat([x[:, place] for place in places], 1) if places else x[:, :0].contiguous()


def _put(x: Tensor, places: Sequence[slice], rows: Tensor, *, add: bool = False) -> None:
    first = 0
    for place in places:
        some = rows[:, first : first + place.stop - place.start]
        x[:, place] = x[:, place] + some if add else some
        first += place.stop - place.start


@dataclass
class _Ring:
    """The rounds of one pass; `block [B,S,G,K+V]`: keys and values of this group that others want."""

    wire: ExchangeWire
    place: RankLayout
    block: Tensor

    def __post_init__(self) -> None:
        inner, ranks = self.place.layout.inner, self.wire.places
        self._next, self._previous = ((self.place.rank + step) % ranks for step in (inner, -inner))

    def run(self, use: Callable[[Tensor, Sequence[Rectangle]], Tensor | None], d_block: Tensor | None = None) -> None:
        """`use(block, work)` for every block from elsewhere.

        With `d_block`, like `block`, it returns the block's gradient, and what others find for this group's is added.
        All ranks send and receive in the same order, as NCCL wants it: the next round's block before this one is used,
        and gradients after it, which are waited for a round later.
        """
        rounds, owed = self.place.rounds, _Owed()
        block, arrival = self._pass_on(_taken(self.block, self.place.first_block), rounds[0].rows if rounds else 0)
        self.wire.wait(arrival)
        for now, after in zip_longest(rounds, rounds[1:]):
            coming, arrival = self._pass_on(_taken(block, now.passed), after.rows if after else 0)
            gradient = use(block, now.work) if now.rows else None
            if d_block is not None:
                owed.collect(self.wire, gradient, d_block)
            self.wire.wait(arrival)
            if d_block is not None:
                owed = self._return(gradient, now, after)
            block = coming
        if d_block is not None:
            owed.collect(self.wire, None, d_block)

    def _pass_on(self, block: Tensor, rows: int) -> tuple[Tensor, Sent]:
        """Sends a block to the next group; one with so many rows comes from the group before."""
        coming = self._empty(rows, self.block.dtype)
        if block.shape[1]:
            self.wire.send(block, self._next)
        if rows:
            self.wire.post(coming, self._previous)
        return coming, self.wire.launch()

    def _return(self, gradient: Tensor | None, now: Round, after: Round | None) -> "_Owed":
        """Sends on the gradients of a block, or home; those of the next block come, and of this group's own."""
        inner, ranks, dtype = self.place.layout.inner, self.wire.places, state_dtype(self.block.dtype)
        if gradient is not None:
            for places, to in ((now.passed, self._next), (now.home, self.place.rank - inner * now.distance)):
                if places:
                    self.wire.send(_taken(gradient, places), to % ranks)
        before = self._empty(after.rows if after else 0, dtype)
        own = self._empty(sum(place.stop - place.start for place in now.back), dtype)
        for x, sender in ((before, self._previous), (own, self.place.rank + inner * now.distance)):
            if x.shape[1]:
                self.wire.post(x, sender % ranks)
        return _Owed(before, own, now.back, self.wire.launch())

    def _empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        return self.block.new_empty(self.block.shape[0], rows, *self.block.shape[2:], dtype=dtype)


@dataclass
class _Owed:
    """Gradients on their way: what those before found for the next block, and what comes home to rows of one's own."""

    before: Tensor | None = None
    own: Tensor | None = None
    back: Sequence[slice] = ()
    launched: Sent = field(default_factory=list)

    def collect(self, wire: ExchangeWire, gradient: Tensor | None, d_block: Tensor) -> None:
        wire.wait(self.launched)
        if gradient is not None and self.before is not None and self.before.shape[1]:
            gradient += self.before
        if self.own is not None:
            _put(d_block, self.back, self.own, add=True)


class _Pass:
    """What both passes share: which queries meet which keys of this rank's group."""

    def __init__(self, place: RankLayout, scale: float, cap: float, fused: bool):
        self.place = place
        self.options: dict[str, Any] = {"scale": scale, "cap": cap, "fused": fused}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """`out` in q's dtype and its log-sum-exp, for all queries of the group."""
        whole, widths = self.place.whole, [k.shape[3], v.shape[3]]
        if whole is not None and self.place.alone:
            return whole[2].attend(q, k, v, **self.options)
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=state_dtype(q.dtype))
        lse = out.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
        if whole is not None:
            queries, keys, documents = whole
            found, sums = documents.attend(_taken(q, queries), _taken(k, keys), _taken(v, keys), **self.options)
            _put(out, queries, found.to(out.dtype))
            _put(lse.transpose(1, 2), queries, sums.transpose(1, 2))

        def use(block: Tensor, work: Sequence[Rectangle]) -> None:
            for rows, seen, causal in work:
                keys, values = block[:, seen].split(widths, -1)
                some, sums = attend(q[:, rows], keys, values, causal=causal, **self.options)
                if not causal:
                    some, sums = merge(out[:, rows], lse[..., rows], some, sums)
                out[:, rows], lse[..., rows] = some, sums

        block = torch.cat([_taken(k, self.place.block), _taken(v, self.place.block)], -1)
        use(block, self.place.own_work)
        if self.place.layout.farthest:
            engine = engine_of(group.group_name)
            with engine.messages(self._agreed("attention", k, v), q.device) as wire:
                _Ring(wire, self.place, block).run(use)
        return out.to(q.dtype), lse

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, in their dtype."""
        whole, widths = self.place.whole, [k.shape[3], v.shape[3]]
        if whole is not None and self.place.alone:
            return whole[2].gradients(d_out, q, k, v, out, lse, **self.options)
        wide = state_dtype(q.dtype)
        dq, dk, dv = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q, k, v))
        if whole is not None:
            queries, keys, documents = whole
            rows = [_taken(x, queries) for x in (d_out, q, out)]
            sums = _taken(lse.transpose(1, 2), queries).transpose(1, 2)
            found = documents.gradients(
                rows[0], rows[1], _taken(k, keys), _taken(v, keys), rows[2], sums, **self.options
            )
            for x, some, gradient in zip((dq, dk, dv), (queries, keys, keys), found, strict=True):
                _put(x, some, gradient.to(wide))

        def use(block: Tensor, work: Sequence[Rectangle]) -> Tensor:
            gradient = torch.zeros_like(block, dtype=wide)
            for rows, seen, causal in work:
                keys, values = block[:, seen].split(widths, -1)
                mine, *theirs = attend_gradients(
                    d_out[:, rows],
                    q[:, rows],
                    keys,
                    values,
                    out[:, rows],
                    lse[..., rows],
                    causal=causal,
                    **self.options,
                )
                dq[:, rows] += mine
                gradient[:, seen] += torch.cat(theirs, -1)
            return gradient

        places = self.place.block
        block = torch.cat([_taken(k, places), _taken(v, places)], -1)
        d_block = use(block, self.place.own_work)
        if self.place.layout.farthest:
            engine = engine_of(group.group_name)
            with engine.messages(self._agreed("attention backward", k, v), q.device) as wire:
                asked = torch.zeros_like(_taken(d_block, self.place.first_block))
                _Ring(wire, self.place, block).run(use, asked)
                _put(d_block, self.place.first_block, asked, add=True)
        for x, gradient in zip((dk, dv), d_block.split(widths, -1), strict=True):
            _put(x, places, gradient)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _agreed(self, what: str, k: Tensor, v: Tensor) -> str:
        return f"{what} {self.place.text} {k.shape[0]} {tuple(k.shape[2:])} {tuple(v.shape[2:])} {k.dtype}"


def _found(numbers: Sequence[int], group_name: str) -> tuple[RankLayout, dist.ProcessGroup]:
    return _layouts[numbers[0]], engine_of(group_name).group


@torch.library.custom_op("seqtrain::sharded_attention", mutates_args=())
def _sharded_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float, fused: bool, numbers: Sequence[int], group_name: str
) -> tuple[Tensor, Tensor]:
    """`out` of this rank's tokens, and the log-sum-exp of its group's for its heads."""
    place, group = _found(numbers, group_name)
    rows, (queries, keys) = _Rows(place, group, ""), place.shares
    near_q, near_k, near_v = rows.to_groups((queries, keys, keys), q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _Pass(place, scale, cap, fused).forward(near_q, near_k, near_v, group)
    [out] = rows.to_ranks([queries], out, rows=[q.shape[1]])
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("seqtrain::sharded_attention_backward", mutates_args=())
def _sharded_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    cap: float,
    fused: bool,
    numbers: Sequence[int],
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    place, group = _found(numbers, group_name)
    rows, (queries, keys) = _Rows(place, group, "backward"), place.shares
    d_out, near_q, near_k, near_v, out = rows.to_groups((queries, queries, keys, keys, queries), d_out, q, k, v, out)
    with torch.autocast(q.device.type, enabled=False):
        found = _Pass(place, scale, cap, fused).backward(d_out, near_q, near_k, near_v, out, lse, group)
    gradients = rows.to_ranks((queries, keys, keys), *found, rows=[q.shape[1], k.shape[1], k.shape[1]])
    # Results of an operator must not share memory.
    dq, dk, dv = (x.clone(memory_format=torch.contiguous_format) for x in gradients)
    return dq, dk, dv


@_sharded_attention.register_fake
def _(q, k, v, scale, cap, fused, numbers, group_name):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, out.new_empty(q.shape[0], q.shape[2] // numbers[2], numbers[1], dtype=state_dtype(q.dtype))


@_sharded_attention_backward.register_fake
def _(d_out, q, k, v, out, lse, scale, cap, fused, numbers, group_name):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.settings = inputs
    # Kept until backward, whoever else forgets it.
    ctx.place = _layouts.get(ctx.settings[3][0])
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.seqtrain.sharded_attention_backward(d_out, *ctx.saved_tensors, *ctx.settings)
    return *gradients, *[None] * len(ctx.settings)


_sharded_attention.register_autograd(_gradients, setup_context=_remember)

COMMUNICATE.add(torch.ops.seqtrain.sharded_attention.default)
