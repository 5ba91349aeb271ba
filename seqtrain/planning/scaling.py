"""What a training step over many ranks would take: a discrete-event model of scans that run as waves over layers.

Times are float64 seconds in arrays `[samples, places]`; a place is a rank's position along the scan, from the first
rank forward, from the last one backward. Each rank has one link, which sends and receives at once; in one direction of
a step, scans wait for the bytes of the scans before. No message leaves before its receiver has entered the layer and
said so, one latency earlier: without this, blocking rings over 8 ranks of gloo took 523 ms, and 730 were measured.
"""

import math
from dataclasses import dataclass

import numpy as np

from seqtrain.kernels.affine import AffineShape
from seqtrain.parallel.schedules import SCHEDULES, Schedule, choose
from seqtrain.parallel.schedules.links import Array, Busy, Cluster, Links, Load


@dataclass(frozen=True)
class Work:
    """A step's work on one rank: `layers` layers, each `forward` and `backward` seconds and one scan each way.

    `ready`: share of a layer's time that passes before its update is known. `caller`: seconds that taking part in a
    scan costs the computing thread itself. `gradient_bytes`: reduced over all ranks at the end. `parameter_bytes`: of a
    layer, gathered by a shard's ranks before it in each direction, as ZeRO-3 does, during the layer before.
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
    """How layers hand states on: the schedule, whether local compute overlaps, a barrier after each layer."""

    schedule: str = "auto"
    blocks: int = 0
    overlapped: bool = True
    barrier: bool = False

    def plan(self, cluster: Cluster, work: Work, ranks: int) -> Schedule:
        """The plan of this schedule; `blocks=0` and `"auto"` are decided by the cost model."""
        if self.blocks:
            return SCHEDULES[self.schedule](self.blocks)
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


STILL = Noise()


def scan_seconds(cluster: Cluster, work: Work, scheme: Scheme, *, ranks: int) -> float:
    """One scan that all ranks start at once."""
    if ranks == 1:
        return 0.0
    links = Links(cluster, ranks, np.ones((1, 3)), reverse=False)
    plan = scheme.plan(cluster, work, ranks)
    idle = np.zeros((1, ranks))
    load = Load.of(work.shape, work.item, cluster.inside.product)
    return float(plan.simulate(idle, Busy(idle, idle, idle - np.inf), links, load)[0].max())


def simulate(
    cluster: Cluster,
    work: Work,
    scheme: Scheme,
    noise: Noise = STILL,
    *,
    ranks: int,
    replicas: int = 1,
    shard: int = 0,
    samples: int = 1,
    seed: int = 0,
) -> Array:
    """Seconds of a step, `[samples]`: `replicas` (data parallel) times `ranks` (sequence parallel) ranks in all.

    `shard`: neighbors that ZeRO divides over, beyond which all is replicated; 0: all ranks.
    """
    generator = np.random.default_rng(seed)
    everyone = ranks * replicas
    shard = shard or everyone
    if still := noise == STILL:
        # All are alike.
        samples, replicas, wanted = 1, 1, samples
    rows = samples * replicas

    def factors(deviation: float, *size: int) -> Array:
        """Of mean 1 and about this relative deviation."""
        if deviation == 0:
            return np.ones(size)
        return np.exp(deviation * generator.standard_normal(size) - deviation**2 / 2)

    def all_gather(links: Links, size: float, over: int = shard, span: int = shard) -> Array:
        """Seconds `[samples, 1]` in which `over` ranks among `span` neighbors gather `size` bytes in equal parts."""
        slow, share = np.array([0 < cluster.node < span]), (over - 1) / over
        return math.ceil(math.log2(over)) * links.latency(slow) + share * size * links.byte(slow)

    cost_factors = np.repeat(factors(noise.costs, samples, 3), replicas, axis=0)
    slow = np.where(generator.random((rows, ranks)) < noise.slow_share, noise.slow_factor, 1.0)
    now = np.zeros((rows, ranks))
    for seconds, reverse in ((work.forward, False), (work.backward, True)):
        links = Links(cluster, ranks, cost_factors, reverse)
        busy = Busy(*(np.zeros((rows, ranks)) for _ in Busy._fields))
        if reverse:
            now, slow = now[:, ::-1], slow[:, ::-1]
        for layer in range(work.layers):
            compute = seconds * slow * factors(noise.compute, rows, ranks)
            before = now, busy
            if work.parameter_bytes:
                now = _together(now) + np.maximum(0.0, all_gather(links, work.parameter_bytes) - seconds)
            now, busy = _layer(now, busy, compute, links, work, scheme)
            if still and layer and (later := _shift(before, (now, busy))) is not None:
                # So do all layers that are left: nothing but sums and maxima makes one's times out of those before.
                now = now + later * (work.layers - 1 - layer)
                break
    ends = now.max(axis=1).reshape(samples, replicas).max(axis=1)
    if still:
        ends = np.repeat(ends, wanted)
    if not work.gradient_bytes:
        return ends
    # A reduce-scatter, then an all-gather: of all in a shard, of a rank's part over the shard's replicas.
    reduced = all_gather(links, work.gradient_bytes)
    reduced = reduced + all_gather(links, work.gradient_bytes / shard, everyone // shard, everyone)
    return ends + 2 * reduced[::replicas, 0]


def _layer(now: Array, busy: Busy, compute: Array, links: Links, work: Work, scheme: Scheme) -> tuple[Array, Busy]:
    """One layer in one direction: when each place is through with it, and its link's occupation."""
    known, rest = now + work.ready * compute, (1 - work.ready) * compute
    if links.ranks == 1:
        return known + rest, busy
    rest = rest + work.caller
    plan = scheme.plan(links.cluster, work, links.ranks)
    load = Load.of(work.shape, work.item, links.cluster.inside.product)
    arrived, busy = plan.simulate(known, busy._replace(posted=now), links, load)
    now = np.maximum(known + rest, arrived) if scheme.overlapped and not plan.blocking else arrived + rest
    if scheme.barrier:
        slow = np.array([links.cluster.node > 0])
        # Its rounds wait for posted receives too.
        now = _together(now) + 2 * (links.ranks - 1).bit_length() * links.latency(slow)
    return now, busy


def _shift(before: tuple[Array, Busy], after: tuple[Array, Busy]) -> float | None:
    """By how many seconds all times of a layer lie behind those of the one before; None where not all by as many.

    Of links, those that a schedule does not use stay as they are.
    """
    (start, old), (end, new) = ((now, np.stack(busy)) for now, busy in (before, after))
    moved = np.isfinite(old) & (old != new)
    shifts = np.concatenate([(end - start).ravel(), new[moved] - old[moved]])
    return float(shifts.mean()) if np.ptp(shifts) <= 1e-9 * np.abs(shifts).max() else None


def _together(now: Array) -> Array:
    return np.broadcast_to(now.max(axis=1, keepdims=True), now.shape)
