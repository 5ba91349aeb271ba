"""What a training step of a layout takes on a machine: seconds, bytes per rank, and what they are made of.

Work is what `counts` finds; the machine's constants are measured on it or come from a YAML file. Compute is a sum over
operators, each as slow as its products or as the bytes it moves; communication is simulated (`scaling`) with the cost
model of the scans. Memory is that of the runtime's engine: float32 weights and AdamW's moments, divided as ZeRO says.
"""

import dataclasses
from dataclasses import dataclass, field
from statistics import fmean
from typing import Annotated

from pydantic import Field

from seqtrain.kernels.affine import AffineShape
from seqtrain.parallel.schedules.links import Cluster
from seqtrain.planning.counts import ModelCounts
from seqtrain.planning.parts import Exchange
from seqtrain.planning.scaling import Scheme, Work, simulate
from seqtrain.planning.trace import Recorded

Rate = Annotated[float, Field(gt=0)]
Scale = Annotated[float, Field(ge=0)]
# Numbers DeepSpeed gathers in a bucket before it reduces them (reduce_bucket_size).
BUCKET = 500_000_000
AUTO = Scheme("auto")
# What computing takes its time for.
CAUSES = ("products", "attention", "kernels", "memory traffic", "calls")


@dataclass(frozen=True)
class Holes:
    """Bytes that an allocator leaves unused between small blocks: for each byte of blocks that are kept, for each of
    those that come and go, and how many more for each of these under ZeRO 3, whose weights come and go between them.
    """

    kept: Scale = 0.0
    passing: Scale = 0.0
    sharded: Scale = 0.0


@dataclass(frozen=True)
class Machine:
    """One rank's processor and memory."""

    # What it is, and where the figures are from.
    name: str
    # Bytes of memory a rank may use; of the whole node where `shared`.
    memory: Rate
    # Whether the ranks of a node share its memory, as processes of one computer do.
    shared: bool = False
    # Processors per node: more ranks than these take turns.
    processors: Annotated[int, Field(gt=0)] = 8
    # FLOP/s of matrix products, by number format.
    products: dict[str, Rate] = field(default_factory=lambda: {"float32": 1e11, "bfloat16": 1e11})
    # FLOP/s of softmax attention, and of the recurrences' kernels.
    attention: Rate = 1e11
    kernels: Rate = 1e11
    # Bytes per second to and from memory.
    stream: Rate = 1e10
    # Seconds for each byte of a large block when it is first touched: where the system gives out empty pages.
    fresh: Scale = 0.0
    # Seconds each operator takes on top of its work, where nothing hides them.
    call: Scale = 0.0
    # Seconds of AdamW for each parameter.
    optimizer: Scale = 1e-10
    # Bytes of a rank before it has a model.
    base: Scale = 0.0
    # Bytes of memory for each byte of small blocks that are kept, and that come and go: allocators leave holes.
    kept_factor: Annotated[float, Field(ge=1)] = 1.0
    passing_factor: Annotated[float, Field(ge=1)] = 1.0
    # The holes of models of one mixer, by mixer, where they were measured: each asks for other blocks.
    holes: dict[str, Holes] = field(default_factory=dict)
    # Bytes that a sharded sequence adds to each kept, and to each passing one: maps and their gradients.
    cut_kept: Scale = 0.0
    cut_passing: Scale = 0.0
    # Measured seconds over those computed from the rates above, by mixer; "mlp" and "loss" too.
    efficiency: dict[str, Rate] = field(default_factory=dict)
    # Seconds of a rank's work while others work on its node, over those alone: caches and memory are shared.
    beside: Rate = 1.0
    # Seconds of a layer on its shard of a sequence, over those on as many tokens of its own, by mixer.
    cut: dict[str, Rate] = field(default_factory=dict)
    # Relative error of predictions, times and memory: half the width of the ranges.
    time_error: Scale = 0.3
    memory_error: Scale = 0.15


@dataclass(frozen=True)
class Layout:
    """How a step is divided: groups of ranks `data`, ranks per sequence `sequence`, ZeRO's `stage`, whether layers are
    recomputed (`checkpointing`), rows at once (`micro_batch`), rows of the whole step (`batch`).
    """

    data: int
    sequence: int
    stage: int
    checkpointing: bool
    micro_batch: int
    batch: int

    @property
    def ranks(self) -> int:
        return self.data * self.sequence

    @property
    def rounds(self) -> int:
        """Micro-batches one after the other."""
        return self.batch // (self.data * self.micro_batch)

    def overrides(self) -> list[str]:
        """The launcher's words for it."""
        return [
            f"parallel.data={self.data}",
            f"parallel.sequence={self.sequence}",
            f"parallel.zero_stage={self.stage}",
            f"model.activation_checkpointing={str(self.checkpointing).lower()}",
            f"train.micro_batch_size={self.micro_batch}",
            f"train.batch_size={self.batch}",
        ]


@dataclass(frozen=True)
class Prediction:
    """`seconds` of a step and `bytes` of a rank, each by what they are made of."""

    layout: Layout
    seconds: dict[str, float]
    bytes: dict[str, float]
    # Bytes a rank may have.
    room: float

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def peak_bytes(self) -> float:
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.room

    @property
    def binds(self) -> str:
        """What most of the time goes to, or most of the memory where that is too little."""
        share = self.seconds if self.fits else self.bytes
        return max(share, key=lambda name: share[name])


def predict(
    counts: ModelCounts, layout: Layout, machine: Machine, cluster: Cluster, scheme: Scheme = AUTO
) -> Prediction:
    """The step of `layout`, given the counts of one rank's micro-batch on it: its tokens of a row, its rows.

    `scheme`: how states travel.
    """
    # Ranks of a node beyond its processors wait for each other.
    here = min(layout.ranks, cluster.node or layout.ranks)
    crowd = max(1.0, here / machine.processors) * (machine.beside if here > 1 else 1.0)
    compute = compute_seconds(counts, machine, checkpointing=layout.checkpointing, shards=layout.sequence)
    compute = {name: crowd * layout.rounds * seconds for name, seconds in compute.items()}
    own = layout.ranks if layout.stage else 1
    update = crowd * machine.optimizer * counts.parameters / own
    exchanged = communication_seconds(counts, layout, cluster, sum(compute.values()), scheme)
    seconds = compute | exchanged | {"optimizer": update}
    room = machine.memory / here if machine.shared else machine.memory
    return Prediction(layout, seconds, memory_bytes(counts, layout, machine), room)


def compute_seconds(counts: ModelCounts, machine: Machine, *, checkpointing: bool, shards: int = 1) -> dict[str, float]:
    """Seconds of one micro-batch's forward and backward pass on one rank that waits for nobody, by cause.

    `checkpointing`: layers are recomputed in the backward pass. `shards`: ranks per sequence, of which `counts` are
    one's.
    """
    total = dict.fromkeys((*CAUSES, "recomputation"), 0.0)
    product = machine.products[str(counts.dtype).removeprefix("torch.")]
    for part in counts.parts:
        factor = machine.efficiency.get(part.kind or part.part, 1.0)
        spread = any(exchange.spread for exchange in part.exchanges)
        if shards > 1 and not spread:
            # A shard finds how its states depend on those before it, too.
            factor *= machine.cut.get(part.kind, 1.0)
        directions = ((part.forward, part.executed_forward), (part.backward, part.executed_backward))
        for index, (recorded, executed) in enumerate(directions):
            taken = {name: factor * s for name, s in _part_seconds(recorded, executed, machine, product).items()}
            if spread:
                # A shard's queries see the keys of all shards: as many times the pairs, shared evenly.
                taken["attention"] *= shards
            for name, seconds in taken.items():
                total[name] += seconds
            if checkpointing and index == 0 and part.layer >= 0:
                total["recomputation"] += sum(taken.values())
    return total


def _part_seconds(recorded: Recorded, executed: float, machine: Machine, product: float) -> dict[str, float]:
    seconds = dict.fromkeys(CAUSES, 0.0)
    seconds["memory traffic"] = machine.fresh * recorded.mapped
    seconds["kernels"] = max(0.0, executed - recorded.flops) / machine.kernels
    for name, calls in recorded.calls.items():
        moving = calls.bytes / machine.stream
        seconds["calls"] += calls.count * machine.call
        if "scaled_dot_product" in name:
            seconds["attention"] += max(moving, calls.flops / machine.attention)
        elif calls.flops:
            seconds["products"] += max(moving, calls.flops / product)
        else:
            seconds["memory traffic"] += moving
    return seconds


def communication_seconds(
    counts: ModelCounts, layout: Layout, cluster: Cluster, compute: float, scheme: Scheme = AUTO
) -> dict[str, float]:
    """Seconds that exchanges add to `compute` seconds of a rank."""
    exchanges = [exchange for part in counts.parts for exchange in part.exchanges]
    scans = [exchange for exchange in exchanges if exchange.shape is not None]
    numbers = 4.0 * counts.parameters
    layers = max(1, len(counts.layers)) * layout.rounds
    largest = max(scans, key=_scan_bytes, default=Exchange(AffineShape(1, 1, 1, identity=True)))
    assert largest.shape is not None, "of the scans alone"
    gathered = numbers / max(1, len(counts.layers)) if layout.stage == 3 and layout.ranks > 1 else 0.0
    ranks = layout.sequence if scans else 1
    bare = Work(layers, compute / layers / 3, compute / layers * 2 / 3, largest.shape, item=largest.item)
    gathering = dataclasses.replace(bare, parameter_bytes=gathered)
    reducing = dataclasses.replace(gathering, gradient_bytes=numbers if layout.ranks > 1 else 0.0)
    passes, with_weights, whole = (
        float(simulate(cluster, each, scheme, ranks=ranks, replicas=layout.ranks // ranks)[0])
        for each in (bare, gathering, reducing)
    )
    return {
        "sequence exchange": max(0.0, passes - compute) + _other_seconds(exchanges, layout, cluster),
        "weights gathered": with_weights - passes,
        "gradient exchange": whole - with_weights,
    }


def _scan_bytes(exchange: Exchange) -> float:
    shape = exchange.shape
    return 0.0 if shape is None else (shape.state_numbers + shape.transition_numbers) * exchange.item


def _other_seconds(exchanges: list[Exchange], layout: Layout, cluster: Cluster) -> float:
    """Of halo and KV exchanges, which are not overlapped, forward, and of their gradients backward."""
    ranks = layout.sequence
    if ranks == 1:
        return 0.0
    costs = cluster.between if 0 < cluster.node < ranks else cluster.inside
    each = 0.0
    for exchange in exchanges:
        if exchange.near:
            each += costs.latency + exchange.near * costs.byte
        if exchange.spread:
            each += 2 * costs.latency * (ranks - 1) + exchange.spread * (ranks - 1) / ranks * costs.byte
    return 2 * layout.rounds * each


def memory_bytes(counts: ModelCounts, layout: Layout, machine: Machine) -> dict[str, float]:
    """Bytes of one rank at the peak of a step, by kind."""
    again, own = layout.checkpointing, 1 / layout.ranks
    size = 4.0 * counts.parameters
    whole, kept = counts.peak_bytes(checkpointing=again), counts.saved_bytes(checkpointing=again)
    small_kept, passing = counts.small_bytes(checkpointing=again)
    holes = _holes(counts, machine)
    sharded = holes.sharded * passing if layout.stage == 3 else 0.0
    maps = machine.cut_kept * small_kept + machine.cut_passing * passing
    bucket = min(size, 4.0 * BUCKET) if layout.ranks > 1 or layout.stage else 0.0
    weights = size * own if layout.stage == 3 else size
    gathered = size / max(1, len(counts.layers)) * 2 if layout.stage == 3 else 0.0
    # ZeRO keeps a float32 copy of its part next to the weights, and the reduced gradients of its part.
    moments = size * 3 * own if layout.stage else size * 2
    reduced = size * own if layout.stage else 0.0
    # From stage 2 on a rank's gradients leave with each bucket; the peak counts all of them.
    fewer = min(whole - kept, size * (1 - own)) if layout.stage >= 2 else 0.0
    return {
        "program": machine.base,
        "weights": weights + gathered,
        "optimizer": moments,
        "gradients reduced": reduced + bucket,
        "activations kept": kept,
        "temporaries and gradients": max(0.0, whole - kept - max(0.0, fewer)),
        "allocator's holes": holes.kept * small_kept + holes.passing * passing + sharded,
        "maps of pieces": maps if layout.sequence > 1 else 0.0,
    }


def _holes(counts: ModelCounts, machine: Machine) -> Holes:
    """The mean of the mixers' own, or the machine's."""
    general = Holes(machine.kept_factor - 1, machine.passing_factor - 1)
    found = [machine.holes.get(part.kind, general) for part in counts.parts if part.part == "mixer"]
    return Holes(*(fmean(each) for each in zip(*map(dataclasses.astuple, found), strict=True)))
