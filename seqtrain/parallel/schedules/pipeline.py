"""A chain of blocks: each is received, mapped and sent on. A place receives one state in all; no transition travels."""

import math
from functools import cache
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape
from seqtrain.parallel.schedules.base import Message, Schedule, Travel
from seqtrain.parallel.schedules.links import Array, Busy, Costs, Links, Load
from seqtrain.parallel.wires import Wire

BLOCK_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


class Pipeline(Schedule):
    """`blocks`: into how many pieces a state is cut."""

    name = "pipeline"

    @classmethod
    def candidates(cls) -> tuple[Schedule, ...]:
        return tuple(cls(blocks) for blocks in BLOCK_COUNTS)

    def receives(self, shape: AffineShape, place: int, places: int) -> list[Message]:
        return [Message(place - 1, numbers) for numbers in cut(shape, self.blocks).sizes(shape)] if place else []

    def prepare(self, wire: Wire, shape: AffineShape, arrivals: Tensor) -> Travel:
        grid = cut(shape, self.blocks)
        outgoing = arrivals.new_empty(shape.state_numbers)
        leaving = grid.flat_views(outgoing, shape)
        entering = grid.flat_views(arrivals, shape) if wire.place else None
        is_last = wire.place == wire.places - 1

        def run(own: AffineMap, first: Tensor | None) -> tuple[Tensor, Tensor]:
            if entering is None:
                assert first is not None, "the first place has the state before it"
                came, incoming = grid.views(first), first
            else:
                came = entering
            pairs = zip(grid.transitions(own.transition), grid.views(own.update), strict=True)
            for pair, block, out in zip(pairs, came, leaving, strict=True):
                # Made while the block is on its way.
                piece = AffineMap(*pair, own.forgets)
                wire.receive(0 if entering is None else 1)
                piece.apply(block, out=out)
                if not is_last:
                    wire.send(out, wire.place + 1)
            if entering is not None:
                incoming = grid.assemble(arrivals, entering, shape)
            final = grid.assemble(outgoing, leaving, shape)
            # A send still reads its buffer, so callers get a state of their own.
            return incoming, final if is_last or not grid.in_order(shape) else final.clone()

        return run

    def alone(self, costs: Costs, load: Load, places: int) -> float:
        sizes = cut(load.shape, self.blocks).sizes(load.shape)
        blocks, largest = len(sizes), max(sizes) / load.shape.state_numbers
        # Each further link takes one block more: the largest, which all after it wait for. 48 blocks of 64 heads take
        # as long as 32: some hold two heads.
        on_link = load.state * costs.byte
        fill = (places - 1) * costs.latency + (on_link + load.apply) / blocks
        fill += (places - 2) * (on_link + load.apply) * largest
        # The link carries one block while the processor handles another: the slower of the two sets the pace, smoothly,
        # since both vary. Chosen among seven forms on measured grids, where two others were as good: it is a fit, not a
        # law.
        return fill + (blocks - 1) * math.hypot(costs.overhead + load.apply / blocks, on_link / blocks)

    def simulate(self, start: Array, busy: Busy, links: Links, load: Load) -> tuple[Array, Busy]:
        latency, overhead, byte = links.latency(links.next), links.overhead(links.next), links.byte(links.next)
        done, free = start, np.maximum(busy.sending[:, :-1], busy.posted[:, 1:] + latency)
        for size in cut(load.shape, self.blocks).sizes(load.shape):
            fraction = size / load.shape.state_numbers
            on_link, apply = load.state * fraction * byte, load.apply * fraction
            hop = latency + on_link + apply
            # A block leaves when it is there and the link is free, is mapped when it has come and the map is known, and
            # the blocks of one place come one after the other. Along the places a chain of blocks is
            # `x[r+1] = max(x[r] + d[r], e[r+1])`, which a running maximum solves for all places and samples at once.
            comes = np.maximum(np.maximum(free + hop, start[:, 1:] + apply), done[:, 1:])
            earliest = np.concatenate([start[:, :1], comes], axis=1)
            travelled = np.concatenate([np.zeros_like(start[:, :1]), np.cumsum(hop, axis=1)], axis=1)
            done = travelled + np.maximum.accumulate(earliest - travelled, axis=1)
            free = np.maximum(done[:, :-1], free) + np.hypot(overhead + apply, on_link)
        return done, busy._replace(sending=np.concatenate([free, done[:, -1:]], axis=1))


class Ring(Pipeline):
    """Whole states along the chain, for which the caller waits: LASP's way, the baseline."""

    name = "ring"
    blocking: ClassVar[bool] = True
    automatic: ClassVar[bool] = False

    @classmethod
    def candidates(cls) -> tuple[Schedule, ...]:
        return (cls(),)


class Cut(NamedTuple):
    """A state cut into independent blocks, row by row of a grid; rows are cut first, they stay contiguous."""

    rows: list[int]
    columns: list[int]

    def views(self, tensor: Tensor) -> list[Tensor]:
        """The blocks of a state or update `[rows, depth, columns]`."""
        if len(self.columns) == 1:
            return list(tensor.split(self.rows))
        return [block for rows in tensor.split(self.rows) for block in rows.split(self.columns, dim=2)]

    def transitions(self, transition: Tensor | None) -> list[Tensor | None]:
        """The transition `[rows, depth, depth]` of each block."""
        if transition is None:
            return [None] * (len(self.rows) * len(self.columns))
        return [rows for rows in transition.split(self.rows) for _ in self.columns]

    def flat_views(self, flat: Tensor, shape: AffineShape) -> list[Tensor]:
        """Blocks that lie one after the other in `flat`, each in its own shape."""
        if self.in_order(shape):
            return self.views(shape.state(flat))
        if len({*self.rows}) == len({*self.columns}) == 1:
            return list(flat.view(-1, self.rows[0], shape.depth, self.columns[0]).unbind())
        shapes = [(rows, shape.depth, columns) for rows in self.rows for columns in self.columns]
        return [block.view(of) for block, of in zip(flat.split(self.sizes(shape)), shapes, strict=True)]

    def sizes(self, shape: AffineShape) -> list[int]:
        """How many numbers each block has."""
        return [rows * shape.depth * columns for rows in self.rows for columns in self.columns]

    def in_order(self, shape: AffineShape) -> bool:
        """Whether blocks laid one after the other are the state as it is."""
        return len(self.columns) == 1 or shape.rows * shape.depth == 1

    def assemble(self, flat: Tensor, blocks: list[Tensor], shape: AffineShape) -> Tensor:
        """The state whose `blocks` lie one after the other in `flat`: the same memory where they are in order."""
        if self.in_order(shape):
            return shape.state(flat)
        state = flat.new_empty(shape.rows, shape.depth, shape.columns)
        for place, block in zip(self.views(state), blocks, strict=True):
            place.copy_(block)
        return state


@cache
def cut(shape: AffineShape, blocks: int) -> Cut:
    """A cut into about `blocks` blocks of nearly equal size, the same on every rank."""
    row_parts = max(1, min(blocks, shape.rows))
    column_parts = max(1, min(-(-blocks // row_parts), shape.columns))
    return Cut(_parts(shape.rows, row_parts), _parts(shape.columns, column_parts))


def _parts(size: int, parts: int) -> list[int]:
    return [(i + 1) * size // parts - i * size // parts for i in range(parts)]
