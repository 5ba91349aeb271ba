"""What a schedule of the collective is: what a place receives, how it runs, what it costs, how it is simulated."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape
from seqtrain.parallel.schedules.links import Array, Busy, Costs, Links, Load
from seqtrain.parallel.wires import Wire

# Runs a scan: from this place's map, and on the first place the state before it, in memory of its own, None elsewhere,
# to `(incoming state, outgoing state)`, `[rows, depth, columns]`.
Travel = Callable[[AffineMap, Tensor | None], tuple[Tensor, Tensor]]


class Message(NamedTuple):
    """`numbers` elements that come from `place`."""

    place: int
    numbers: int


@dataclass(frozen=True)
class Schedule(ABC):
    """How one scan travels, with its settings. Ranks that scan together have equal ones.

    `blocks`: into how many pieces a state is cut, where the schedule cuts it.
    """

    name: ClassVar[str]
    # Whether the caller waits inside `start` instead of computing meanwhile.
    blocking: ClassVar[bool] = False
    # Whether `algorithm="auto"` considers it.
    automatic: ClassVar[bool] = True

    blocks: int = 1

    @classmethod
    def candidates(cls) -> tuple["Schedule", ...]:
        """The settings among which measured costs decide."""
        return (cls(),)

    @abstractmethod
    def receives(self, shape: AffineShape, place: int, places: int) -> list[Message]:
        """What a place receives, in the order it is waited for: buffers are posted before there is anything to send."""

    @abstractmethod
    def prepare(self, wire: Wire, shape: AffineShape, arrivals: Tensor) -> Travel:
        """How a scan that is opened here runs, with all that can be ready before its map is known.

        `arrivals`: one flat buffer that the messages of `receives` fill in their order.
        """

    @abstractmethod
    def alone(self, costs: Costs, load: Load, places: int) -> float:
        """Predicted seconds from the first of two or more places' start to the last one's end, all else idle."""

    @abstractmethod
    def simulate(self, start: Array, busy: Busy, links: Links, load: Load) -> tuple[Array, Busy]:
        """When each place has its incoming state, if it knows its map at `start`, and its link's occupation after it.

        With simultaneous starts and equal links it takes what `alone` says, or less.
        """

    def seconds(self, costs: Costs, shape: AffineShape, places: int, item: int) -> float:
        """`alone` for a state of this shape; `item`: bytes per number. Nothing for one place."""
        return 0.0 if places == 1 else self.alone(costs, Load.of(shape, item, costs.product), places)

    def payload_bytes(self, shape: AffineShape, places: int, item: int) -> list[int]:
        """Bytes each place receives in one scan, headers not counted."""
        return [item * sum(m.numbers for m in self.receives(shape, place, places)) for place in range(places)]


def map_numbers(shape: AffineShape, state_only: bool) -> int:
    """How many numbers a map has as a message: the update, then the transition unless only a state is meant."""
    return shape.state_numbers + (0 if state_only else shape.transition_numbers)


def packed(affine: AffineMap, shape: AffineShape, *, state_only: bool) -> Tensor:
    """A map as a message, in memory of its own."""
    parts = [affine.update.reshape(-1)]
    if not state_only and not shape.identity:
        assert affine.transition is not None, f"a map of shape {shape} has lost its transition"
        parts.append(affine.transition.reshape(-1))
    return torch.cat(parts)


def unpacked(message: Tensor, shape: AffineShape, *, state_only: bool, forgets: bool = False) -> AffineMap:
    """The map of a message, in its memory."""
    update = shape.state(message[: shape.state_numbers])
    transition = None if state_only or shape.identity else shape.transition(message[shape.state_numbers :])
    return AffineMap(transition, update, forgets)
