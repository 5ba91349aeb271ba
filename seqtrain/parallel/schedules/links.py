"""What a scan's messages travel over: measured costs, and a cluster's links as a simulated scan sees them.

Simulated times are float64 seconds in arrays `[samples, places]`; a place is a rank's position along the scan.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from seqtrain.kernels.affine import AffineShape

Array = np.ndarray


@dataclass(frozen=True)
class Costs:
    """What was measured: `latency` seconds for a small message from rank to rank, everything included; `overhead`
    seconds for each further message after it; `byte` seconds per byte of a long one; `product` seconds per
    multiply-add of a dense transition.
    """

    latency: float
    overhead: float
    byte: float
    product: float


@dataclass(frozen=True)
class Load:
    """One scan's work: bytes of a state and of a transition, seconds to apply a map and to compose two."""

    shape: AffineShape
    state: int
    transition: int
    apply: float
    compose: float

    @classmethod
    def of(cls, shape: AffineShape, item: int, product: float) -> "Load":
        """`item`: bytes per number; `product`: as in `Costs`. Elementwise products cost nothing."""
        dense = 0.0 if shape.depth == 1 else product * shape.depth
        state, transition = shape.state_numbers, shape.transition_numbers
        return cls(shape, state * item, transition * item, dense * state, dense * transition)


@dataclass(frozen=True)
class Cluster:
    """Nodes of `node` ranks each (0: one node): the links inside a node, and those between nodes."""

    inside: Costs
    between: Costs
    node: int = 0

    def crosses(self, first: Array, second: Array) -> Array:
        """Whether messages between these ranks leave a node."""
        return np.zeros(first.shape, bool) if self.node == 0 else first // self.node != second // self.node

    def average(self, ranks: int) -> Costs:
        """What a measurement along the ranks would report, and so what `auto` decides by."""
        places = np.arange(max(ranks, 2))
        share = self.crosses(places[1:], places[:-1]).mean()

        def mixed(cost: str) -> float:
            inside, between = getattr(self.inside, cost), getattr(self.between, cost)
            return float(inside + share * (between - inside))

        return Costs(mixed("latency"), mixed("overhead"), mixed("byte"), self.inside.product)


class Links:
    """The links along one scan: costs by place, times `factors: [samples, 3]` of latency, overhead and byte.

    Costs come as `[samples, 1]` or `[samples, places]`.
    """

    def __init__(self, cluster: Cluster, ranks: int, factors: Array, reverse: bool):
        self.cluster, self.ranks, self.factors = cluster, ranks, factors
        places = np.arange(ranks)
        self.ids = places[::-1] if reverse else places

    def latency(self, crosses: Array) -> Array:
        return self.factors[:, :1] * np.where(crosses, self.cluster.between.latency, self.cluster.inside.latency)

    def overhead(self, crosses: Array) -> Array:
        return self.factors[:, 1:2] * np.where(crosses, self.cluster.between.overhead, self.cluster.inside.overhead)

    def byte(self, crosses: Array) -> Array:
        return self.factors[:, 2:3] * np.where(crosses, self.cluster.between.byte, self.cluster.inside.byte)

    @cached_property
    def next(self) -> Array:
        """Whether the link from each place to the next leaves a node, `[places - 1]`."""
        return self.cluster.crosses(self.ids[:-1], self.ids[1:])

    @cached_property
    def node_ends(self) -> tuple[Array, Array]:
        """The first and the last place of each place's node."""
        index = np.arange(self.ranks)
        first = np.maximum.accumulate(np.where(np.concatenate([[True], self.next]), index, 0))
        ends = np.where(np.concatenate([self.next, [True]]), index, self.ranks)
        return first, np.minimum.accumulate(ends[::-1])[::-1]


class Busy(NamedTuple):
    """Until when each place's link sends, until when it receives, and when the place has posted its receives."""

    sending: Array
    receiving: Array
    posted: Array
