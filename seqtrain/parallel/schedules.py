"""The ways a scan can travel: a chain of blocks, a tree of composed maps, or everything to everyone (MATH.md, 3).

A *place* is a rank's position along the scan: its rank forwards, counted from the last rank backwards. Each schedule
says what a place receives, so that buffers can be posted before there is anything to send, and then runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape
from seqtrain.parallel.wire import Wire


@dataclass(frozen=True)
class Plan:
    """How one scan travels: the schedule's name and, for the pipeline, into how many blocks a state is cut.

    `blocking`: the caller waits inside `start` instead of computing meanwhile.
    """

    schedule: str
    blocks: int = 1
    blocking: bool = False


class Message(NamedTuple):
    """`numbers` elements that come from `place`."""

    place: int
    numbers: int


@dataclass(frozen=True)
class Line:
    """Where a rank stands: `place` of `places`, and the wire to the others, addressed by place."""

    place: int
    places: int
    wire: Wire
    reverse: bool

    def post(self, buffer: Tensor, place: int) -> None:
        self.wire.post(buffer, self._rank(place))

    def send(self, buffer: Tensor, place: int) -> None:
        self.wire.send(buffer, self._rank(place))

    def _rank(self, place: int) -> int:
        return self.places - 1 - place if self.reverse else place


class Schedule(NamedTuple):
    """`receives(shape, plan, place, places)` lists the messages in the order they are waited for.

    `run(line, shape, plan, own map, state before the first place or None, arrivals)` returns
    `(incoming state, outgoing state)`, `arrivals` being one flat buffer with room for all messages in that order.
    """

    receives: Callable[[AffineShape, Plan, int, int], list[Message]]
    run: Callable[[Line, AffineShape, Plan, AffineMap, Tensor | None, Tensor], tuple[Tensor, Tensor]]


class Cut(NamedTuple):
    """A state cut into independent blocks, row by row of a grid; rows are cut first, they stay contiguous."""

    rows: list[int]
    columns: list[int]

    @property
    def blocks(self) -> int:
        return len(self.rows) * len(self.columns)

    def views(self, tensor: Tensor) -> list[Tensor]:
        """The blocks of a state or update `[rows, depth, columns]`."""
        if len(self.columns) == 1:
            return list(tensor.split(self.rows))
        return [block for rows in tensor.split(self.rows) for block in rows.split(self.columns, dim=2)]

    def transitions(self, transition: Tensor | None) -> list[Tensor | None]:
        """The transition `[rows, depth, depth]` of each block."""
        if transition is None:
            return [None] * self.blocks
        return [rows for rows in transition.split(self.rows) for _ in self.columns]

    def flat_views(self, flat: Tensor, shape: AffineShape) -> list[Tensor]:
        """Blocks that lie one after the other in `flat`, each in its own shape."""
        if self.in_order(shape):
            return self.views(shape.state(flat))
        sizes = self.sizes(shape)
        shapes = [(rows, shape.depth, columns) for rows in self.rows for columns in self.columns]
        return [block.view(of) for block, of in zip(flat.split(sizes), shapes, strict=True)]

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


# Pipeline: a block is received, mapped and sent on; each place receives one state in all, and no transition travels.


def _pipeline_receives(shape: AffineShape, plan: Plan, place: int, places: int) -> list[Message]:
    if place == 0:
        return []
    return [Message(place - 1, numbers) for numbers in cut(shape, plan.blocks).sizes(shape)]


def _pipeline(
    line: Line, shape: AffineShape, plan: Plan, own: AffineMap, first: Tensor | None, arrivals: Tensor
) -> tuple[Tensor, Tensor]:
    grid = cut(shape, plan.blocks)
    is_first, is_last = line.place == 0, line.place == line.places - 1
    # Everything that can be prepared is, before the first block is waited for.
    outgoing = own.update.new_empty(shape.state_numbers)
    leaving = grid.flat_views(outgoing, shape)
    state = _first_state(own, first) if is_first else None
    entering = grid.flat_views(arrivals, shape) if state is None else grid.views(state)
    maps = [AffineMap(*pair) for pair in zip(grid.transitions(own.transition), grid.views(own.update), strict=True)]
    for piece, block, out in zip(maps, entering, leaving, strict=True):
        line.wire.receive(0 if is_first else 1)
        piece.apply(block, out=out)
        if not is_last:
            line.send(out, line.place + 1)
    incoming = grid.assemble(arrivals, entering, shape) if state is None else state
    final = grid.assemble(outgoing, leaving, shape)
    # A send still reads its buffer, so callers get a state of their own.
    return incoming, final if is_last or not grid.in_order(shape) else final.clone()


# Tree (Kogge and Stone): in round d a place sends the map of the 2^d places up to itself; log2(P) rounds in all.


def _tree_receives(shape: AffineShape, plan: Plan, place: int, places: int) -> list[Message]:
    messages, distance = [], 1
    while distance < places:
        if place >= distance:
            # A sender that has already reached the first place knows a state: its transition has nothing to act on.
            reached = place - distance < distance
            messages.append(Message(place - distance, _map_numbers(shape, reached)))
        distance *= 2
    return messages


def _tree(
    line: Line, shape: AffineShape, plan: Plan, own: AffineMap, first: Tensor | None, arrivals: Tensor
) -> tuple[Tensor, Tensor]:
    before = AffineMap(None, torch.zeros_like(own.update))  # the places from the left up to here, this one not included
    upto = own  # the same, this one included
    if line.place == 0:
        before = AffineMap(None, _first_state(own, first))
        upto = AffineMap(None, own.apply(before.update))
    distance, offset = 1, 0
    while distance < line.places:
        reached = line.place < distance
        if line.place + distance < line.places:
            line.send(_packed(upto, shape, state_only=reached), line.place + distance)
        if line.place >= distance:
            state_only = line.place - distance < distance
            numbers = _map_numbers(shape, state_only)
            line.wire.receive()
            earlier = _unpacked(arrivals[offset : offset + numbers], shape, state_only=state_only)
            before = earlier if distance == 1 else before.after(earlier)
            if line.place + 2 * distance < line.places:
                upto = own.after(before)
            offset += numbers
        else:
            line.wire.receive(0)
        distance *= 2
    return before.update, own.apply(before.update)


# All-gather: every place sends its map to all behind it, which fold what they get; one latency, P states.


def _gather_receives(shape: AffineShape, plan: Plan, place: int, places: int) -> list[Message]:
    return [Message(source, _map_numbers(shape, source == 0)) for source in range(place)]


def _gather(
    line: Line, shape: AffineShape, plan: Plan, own: AffineMap, first: Tensor | None, arrivals: Tensor
) -> tuple[Tensor, Tensor]:
    if line.place == 0:
        incoming = _first_state(own, first)
        mine = AffineMap(None, own.apply(incoming))
    else:
        mine = own
    packed = _packed(mine, shape, state_only=line.place == 0)
    for place in range(line.place + 1, line.places):
        line.send(packed, place)
    line.wire.receive(line.place)
    offset = 0
    for message in _gather_receives(shape, plan, line.place, line.places):
        piece = arrivals[offset : offset + message.numbers]
        earlier = _unpacked(piece, shape, state_only=message.place == 0)
        incoming = earlier.update if message.place == 0 else earlier.apply(incoming)
        offset += message.numbers
    return incoming, own.apply(incoming)


def _first_state(own: AffineMap, first: Tensor | None) -> Tensor:
    if first is None:
        return torch.zeros_like(own.update, memory_format=torch.contiguous_format)
    return first.clone(memory_format=torch.contiguous_format)


def _map_numbers(shape: AffineShape, state_only: bool) -> int:
    return shape.state_numbers + (0 if state_only else shape.transition_numbers)


def _packed(affine: AffineMap, shape: AffineShape, *, state_only: bool) -> Tensor:
    """A map as one message of its own memory: the update, then the transition unless only a state is meant."""
    parts = [affine.update.reshape(-1)]
    if not state_only and not shape.identity:
        assert affine.transition is not None, f"a map of shape {shape} has lost its transition"
        parts.append(affine.transition.reshape(-1))
    return torch.cat(parts)


def _unpacked(message: Tensor, shape: AffineShape, *, state_only: bool) -> AffineMap:
    update = shape.state(message[: shape.state_numbers])
    if state_only or shape.identity:
        return AffineMap(None, update)
    return AffineMap(shape.transition(message[shape.state_numbers :]), update)


SCHEDULES = {
    "pipeline": Schedule(_pipeline_receives, _pipeline),
    "tree": Schedule(_tree_receives, _tree),
    "all_gather": Schedule(_gather_receives, _gather),
}
