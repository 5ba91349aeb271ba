"""What a training step over many ranks would take: a discrete-event model of scans that run as waves over layers.

Events are not queued one by one: along the ranks a chain of blocks is `x[r+1] = max(x[r] + d[r], e[r+1])`, which a
running maximum solves for all ranks and samples at once. Times are float64 seconds in arrays `[samples, places]`; a
place is a rank's position along the scan (from the first rank forward, from the last one backward).
With simultaneous starts a pipeline of equal blocks and an all-gather take exactly what `seqtrain.parallel.cost.seconds`
says, from the same measured costs; a tree takes that or less. Each rank has one link, which sends and receives at
once; in one direction of a step, scans wait for the bytes of the scans before. No message leaves before its receiver
has entered the layer and said so, one latency earlier: without this rule a step over 8 ranks of gloo with blocking
rings came out as 523 ms, and 730 were measured.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from seqtrain.kernels.affine import AffineShape
from seqtrain.parallel.cost import Costs, choose
from seqtrain.parallel.schedules import Plan, cut

Array = np.ndarray


@dataclass(frozen=True)
class Cluster:
    """Nodes of `node` ranks each (0: one node): the links inside a node, and those between nodes."""

    inside: Costs
    between: Costs
    node: int = 0

    def crosses(self, first: Array, second: Array) -> Array:
        """Whether messages between these places leave a node."""
        return np.zeros(first.shape, bool) if self.node == 0 else first // self.node != second // self.node

    def average(self, ranks: int) -> Costs:
        """What a measurement along the ranks would report, and so what `auto` decides by."""
        places = np.arange(max(ranks, 2))
        share = self.crosses(places[1:], places[:-1]).mean()

        def mixed(inside: float, between: float) -> float:
            return float(inside + share * (between - inside))

        return Costs(
            mixed(self.inside.latency, self.between.latency),
            mixed(self.inside.overhead, self.between.overhead),
            mixed(self.inside.byte, self.between.byte),
            self.inside.product,
        )


@dataclass(frozen=True)
class Work:
    """A step's work on one rank: `layers` layers, each `forward` and `backward` seconds and one scan each way.

    `ready`: share of a layer's time that passes before its update is known. `caller`: seconds that taking part in a
    scan costs the computing thread itself. `gradient_bytes`: reduced over all ranks
    at the end. `parameter_bytes`: of a layer, gathered by all ranks before it in each direction, as ZeRO-3 does, under
    the compute of the layer before.
    """

    layers: int
    forward: float
    backward: float
    shape: AffineShape
    item: int = 4
    ready: float = 0.0
    caller: float = 0.0
    gradient_bytes: float = 0.0
    parameter_bytes: float = 0.0

    @property
    def compute(self) -> float:
        """Seconds of a step on a rank that waits for nobody."""
        return self.layers * (self.forward + self.backward)


@dataclass(frozen=True)
class Scheme:
    """How layers hand states on: the schedule, whether local compute goes on meanwhile, a barrier after each layer."""

    schedule: str = "auto"
    blocks: int = 0
    overlapped: bool = True
    barrier: bool = False

    def plan(self, cluster: Cluster, work: Work, ranks: int) -> Plan:
        """The plan of this schedule; `blocks=0` and `"auto"` are decided by the cost model."""
        if self.schedule == "ring":
            return Plan("pipeline", 1, blocking=True)
        if self.schedule in ("tree", "all_gather"):
            return Plan(self.schedule)
        if self.schedule == "pipeline" and self.blocks:
            return Plan("pipeline", self.blocks)
        return choose(cluster.average(ranks), work.shape, ranks, work.item, self.schedule)


@dataclass(frozen=True)
class Noise:
    """What varies. `compute`: relative deviation of a layer's time, another for every rank, layer and direction;
    `slow_share` of the ranks take `slow_factor` times as long; `costs`: relative deviation of latency, overhead and
    byte, another for every sample.
    """

    compute: float = 0.0
    slow_share: float = 0.0
    slow_factor: float = 1.0
    costs: float = 0.0


class _Wires:
    """The links as a scan sees them: costs by place, varied by sample, `[samples, 1]` or `[samples, places]`."""

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


class _Busy(NamedTuple):
    """Until when each place's link sends, until when it receives, and when the place has posted its receives."""

    sending: Array
    receiving: Array
    posted: Array


@dataclass(frozen=True)
class _Load:
    """One scan's bytes and products."""

    state: float
    transition: float
    apply: float
    compose: float
    fractions: tuple[float, ...]

    @classmethod
    def of(cls, work: Work, plan: Plan, product: float) -> "_Load":
        shape = work.shape
        dense = 0.0 if shape.depth == 1 else product * shape.depth
        sizes = cut(shape, plan.blocks).sizes(shape) if plan.schedule == "pipeline" else [shape.state_numbers]
        return cls(
            state=shape.state_numbers * work.item,
            transition=shape.transition_numbers * work.item,
            apply=dense * shape.state_numbers,
            compose=dense * shape.transition_numbers,
            fractions=tuple(size / shape.state_numbers for size in sizes),
        )


def _pipeline(start: Array, busy: _Busy, wires: _Wires, load: _Load) -> tuple[Array, _Busy]:
    """When each place has its incoming state, and its link's occupation."""
    latency, overhead, byte = wires.latency(wires.next), wires.overhead(wires.next), wires.byte(wires.next)
    done, free = start, np.maximum(busy.sending[:, :-1], busy.posted[:, 1:] + latency)
    for fraction in load.fractions:
        on_link, apply = load.state * fraction * byte, load.apply * fraction
        hop = latency + on_link + apply
        # A block leaves when it is there and the link is free, is mapped when it has come and the map is known, and
        # the blocks of one place come one after the other.
        comes = np.maximum(np.maximum(free + hop, start[:, 1:] + apply), done[:, 1:])
        earliest = np.concatenate([start[:, :1], comes], axis=1)
        travelled = np.concatenate([np.zeros_like(start[:, :1]), np.cumsum(hop, axis=1)], axis=1)
        done = travelled + np.maximum.accumulate(earliest - travelled, axis=1)
        free = np.maximum(done[:, :-1], free) + np.hypot(overhead + apply, on_link)
    return done, busy._replace(sending=np.concatenate([free, done[:, -1:]], axis=1))


def _tree(start: Array, busy: _Busy, wires: _Wires, load: _Load) -> tuple[Array, _Busy]:
    """The same over log2(P) rounds."""
    places, time = wires.ranks, start
    sending, receiving = busy.sending.copy(), busy.receiving.copy()
    rounds = (places - 1).bit_length()
    for turn in range(rounds):
        distance = 1 << turn
        sources = np.arange(places - distance)
        numbers = load.state + np.where(sources < distance, 0.0, load.transition)
        crosses = wires.cluster.crosses(wires.ids[:-distance], wires.ids[distance:])
        byte, latency = wires.byte(crosses), wires.latency(crosses)
        leaves = np.maximum(np.maximum(time, sending)[:, :-distance], busy.posted[:, distance:] + latency)
        sending[:, :-distance] = leaves + numbers * byte
        if turn == 0:
            # The first place sends its state for all rounds at once, over one link.
            numbers[0] = max(numbers[0], (1 + rounds) / 2 * load.state)
        sent = leaves + latency + numbers * byte
        receiving[:, distance:] = np.maximum(sent, receiving[:, distance:] + numbers * byte)
        local = 0.0 if 2 * distance >= places else 2 * load.apply + 2 * load.compose * (load.transition > 0)
        later = np.maximum(time[:, distance:], receiving[:, distance:]) + local
        time = np.concatenate([time[:, :distance], later], axis=1)
    return time, busy._replace(sending=sending, receiving=receiving)


def _gather(start: Array, busy: _Busy, wires: _Wires, load: _Load) -> tuple[Array, _Busy]:
    """The same where each place gets the maps of all before it: the first to come, and all bytes on its one link."""
    places = wires.ranks
    index = np.arange(places)
    sizes = load.state + np.where(index == 0, 0.0, load.transition)
    before = np.concatenate([[0.0], np.cumsum(sizes)[:-1]])
    first, last = _boundaries(wires)
    near, far = (wires.byte(np.full(1, crosses)) for crosses in (False, True))
    # What comes in from the own node, and from others; what goes out likewise.
    received = (before - before[first]) * near + before[first] * far
    sent = sizes * ((last - index) * near + (places - 1 - last) * far)
    slow = np.array([first[-1] > 0])
    latency, overhead = wires.latency(slow), wires.overhead(slow)
    leaves = np.maximum(start, busy.sending) + sent
    ready = np.maximum(busy.receiving, busy.posted + latency)[:, 1:]
    comes = np.maximum(np.minimum.accumulate(start, axis=1)[:, :-1], ready) + received[:, 1:]
    behind = np.maximum(comes, np.maximum.accumulate(leaves, axis=1)[:, :-1])
    meeting = latency / 2 if places > 2 else 0.0
    handled = np.maximum(index[1:] - 1, 0) * overhead + index[1:] * load.apply
    arrived = np.maximum(start[:, 1:], behind + latency + meeting + handled)
    receiving = np.concatenate([busy.receiving[:, :1], comes], axis=1)
    return np.concatenate([start[:, :1], arrived], axis=1), busy._replace(sending=leaves, receiving=receiving)


def _boundaries(wires: _Wires) -> tuple[Array, Array]:
    """The first and the last place of each place's node."""
    index = np.arange(wires.ranks)
    starts = np.concatenate([[True], wires.next])
    ends = np.concatenate([wires.next, [True]])
    first = np.maximum.accumulate(np.where(starts, index, 0))
    last = np.minimum.accumulate(np.where(ends, index, wires.ranks)[::-1])[::-1]
    return first, last


_RUN = {"pipeline": _pipeline, "tree": _tree, "all_gather": _gather}


def scan_seconds(cluster: Cluster, work: Work, scheme: Scheme, *, ranks: int) -> float:
    """One scan that all ranks start at once."""
    if ranks == 1:
        return 0.0
    wires = _Wires(cluster, ranks, np.ones((1, 3)), reverse=False)
    plan = scheme.plan(cluster, work, ranks)
    idle = np.zeros((1, ranks))
    load = _Load.of(work, plan, cluster.inside.product)
    return float(_RUN[plan.schedule](idle, _Busy(idle, idle, idle - np.inf), wires, load)[0].max())


def simulate(
    cluster: Cluster,
    work: Work,
    scheme: Scheme,
    noise: Noise | None = None,
    *,
    ranks: int,
    replicas: int = 1,
    samples: int = 1,
    seed: int = 0,
) -> Array:
    """Seconds of a step, `[samples]`: `replicas` (data parallel) times `ranks` (sequence parallel) ranks in all."""
    noise = Noise() if noise is None else noise
    generator = np.random.default_rng(seed)
    rows = samples * replicas
    factors = np.repeat(_lognormal(generator, noise.costs, (samples, 3)), replicas, axis=0)
    slow = np.where(generator.random((rows, ranks)) < noise.slow_share, noise.slow_factor, 1.0)
    now = np.zeros((rows, ranks))
    for seconds, reverse in ((work.forward, False), (work.backward, True)):
        wires = _Wires(cluster, ranks, factors, reverse)
        busy = _Busy(*(np.zeros((rows, ranks)) for _ in _Busy._fields))
        if reverse:
            now, slow = now[:, ::-1], slow[:, ::-1]
        for _ in range(work.layers):
            compute = seconds * slow * _lognormal(generator, noise.compute, (rows, ranks))
            if work.parameter_bytes:
                now = _together(now) + np.maximum(0.0, _all_gather(wires, work.parameter_bytes, replicas) - seconds)
            now, busy = _layer(now, busy, compute, wires, work, scheme)
    ends = now.max(axis=1).reshape(samples, replicas).max(axis=1)
    if work.gradient_bytes:
        # A reduce-scatter, then an all-gather.
        ends = ends + 2 * _all_gather(wires, work.gradient_bytes, replicas)[::replicas, 0]
    return ends


def _layer(now: Array, busy: _Busy, compute: Array, wires: _Wires, work: Work, scheme: Scheme) -> tuple[Array, _Busy]:
    """One layer in one direction: when each place is through with it, and its link's occupation."""
    known, rest = now + work.ready * compute, (1 - work.ready) * compute + (work.caller if wires.ranks > 1 else 0.0)
    if wires.ranks > 1:
        plan = scheme.plan(wires.cluster, work, wires.ranks)
        load = _Load.of(work, plan, wires.cluster.inside.product)
        arrived, busy = _RUN[plan.schedule](known, busy._replace(posted=now), wires, load)
        overlapped = scheme.overlapped and not plan.blocking
        now = np.maximum(known + rest, arrived) if overlapped else arrived + rest
    else:
        now = known + rest
    if scheme.barrier and wires.ranks > 1:
        slow = np.array([wires.cluster.node > 0])
        # Its rounds wait for posted receives too.
        now = _together(now) + 2 * (wires.ranks - 1).bit_length() * wires.latency(slow)
    return now, busy


def _together(now: Array) -> Array:
    return np.broadcast_to(now.max(axis=1, keepdims=True), now.shape)


def _all_gather(wires: _Wires, size: float, replicas: int) -> Array:
    """Seconds `[samples, 1]` in which all ranks of all replicas gather `size` bytes that lie in equal parts on them."""
    everyone = wires.ranks * replicas
    slow = np.array([0 < wires.cluster.node < everyone])
    share = (everyone - 1) / everyone
    return math.ceil(math.log2(everyone)) * wires.latency(slow) + share * size * wires.byte(slow)


def _lognormal(generator: np.random.Generator, deviation: float, size: tuple[int, ...]) -> Array:
    """Factors of mean 1 and about this relative deviation."""
    if deviation == 0:
        return np.ones(size)
    return np.exp(deviation * generator.standard_normal(size) - deviation**2 / 2)
