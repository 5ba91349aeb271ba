"""What a training step of a layout takes on a machine: seconds, bytes per rank, and what they are made of.

Work is what `counts` finds; the machine's constants are measured on it or come from a YAML file. Compute is a sum over
operators, each as slow as its products or as the bytes it moves; communication is simulated (`scaling`) with the cost
model of the scans. Memory is that of the runtime's engine: float32 weights and AdamW's moments, divided as ZeRO says.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field

from seqtrain.errors import ConfigError, SeqtrainError
from seqtrain.kernels.affine import AffineShape
from seqtrain.parallel.attention_layout import Heads, cheapest, exposed
from seqtrain.parallel.schedules.links import Cluster, Costs
from seqtrain.planning.counts import ModelCounts
from seqtrain.planning.scaling import Scheme, Work, simulate
from seqtrain.planning.trace import Recorded
from seqtrain.runtime.settings import ParallelConfig
from seqtrain.runtime.zero import LARGEST_BUCKET, STAGE_3_PART
from seqtrain.validation import validate

CLUSTERS = Path(__file__).parent / "clusters"
Rate = Annotated[float, Field(gt=0)]
Scale = Annotated[float, Field(ge=0)]
AUTO = Scheme("auto")
# What computing takes its time for.
CAUSES = ("products", "attention", "kernels", "memory traffic", "calls")


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
    # Blocks of memory above so many bytes come from the system, with empty pages, each time; 0: the program keeps all.
    mapped_above: Scale = 0.0
    # Seconds for each byte of such a block when it is first touched.
    fresh: Scale = 0.0
    # Seconds each operator takes on top of its work, where nothing hides them.
    call: Scale = 0.0
    # Seconds of AdamW for each parameter.
    optimizer: Scale = 1e-10
    # Bytes of a rank before it has a model.
    base: Scale = 0.0
    # Bytes that an allocator leaves unused for each byte of smaller blocks that are kept, and that come and go.
    unused_kept: Scale = 0.0
    unused_passing: Scale = 0.0
    # Measured seconds over those computed from the rates above, by mixer; "mlp" and "loss" too.
    efficiency: dict[str, Rate] = field(default_factory=dict)
    # Seconds of a rank's work while others work on its node, over those alone: caches and memory are shared.
    beside: Rate = 1.0
    # Seconds of a layer on its shard of a sequence, over those on as many tokens of its own, by mixer.
    cut: dict[str, Rate] = field(default_factory=dict)
    # The number format that products are fastest in.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # How far predictions were from measurements: by a factor of up to 1 + error, either way.
    time_error: Scale = 0.3
    memory_error: Scale = 0.15


@dataclass(frozen=True)
class ClusterFile:
    """What a cluster file says; seconds, and ranks per node. 0 between nodes: as inside."""

    latency: Scale
    overhead: Scale
    byte: Scale
    product: Scale
    source: str
    node: Annotated[int, Field(ge=0)] = 0
    between_latency: Scale = 0.0
    between_overhead: Scale = 0.0
    between_byte: Scale = 0.0
    # Of a layer, one way, for the simulation of steps.
    forward: Scale = 0.0
    backward: Scale = 0.0
    # What a scan takes of the computing thread's own time.
    caller: Scale = 0.0
    # One rank's processor, for the planner.
    machine: Machine | None = None

    def links(self, *, node: int = 0, latency_add: float = 0.0, byte_factor: float = 1.0) -> Cluster:
        """The links, their latency changed by `latency_add` seconds, with `byte_factor` times the seconds per byte.

        `node`: ranks per node in place of the file's.
        """

        def costs(latency: float, overhead: float, byte: float) -> Costs:
            return Costs(max(0.0, latency + latency_add), overhead, byte * byte_factor, self.product)

        between = self.between_latency or self.latency, self.between_overhead or self.overhead
        return Cluster(
            costs(self.latency, self.overhead, self.byte),
            costs(*between, self.between_byte or self.byte),
            node or self.node,
        )


def read_cluster(cluster: str) -> ClusterFile:
    """A cluster file, or the shipped one of this name; `ConfigError` says what is wrong with it."""
    shipped = CLUSTERS / f"{cluster}.yaml"
    try:
        values = yaml.safe_load((shipped if shipped.exists() else Path(cluster)).read_text())
        return validate(ClusterFile, values)
    except (OSError, yaml.YAMLError, SeqtrainError) as error:
        raise ConfigError(f"cluster={cluster}: {error}") from error


@dataclass(frozen=True)
class Layout:
    """How a step is divided: groups of ranks `data`, ranks per sequence `sequence`, ZeRO's `stage`, whether layers are
    recomputed (`checkpointing`), rows at once (`micro_batch`), rows of the whole step (`batch`), ranks over which
    experts are sharded (`experts`), pieces in which a micro-batch runs (`segments`), whether a pass finds the states
    between them first (`exact`), whether activations are kept in the CPU's memory (`offloaded`), ranks over which
    layers are divided (`tensor`), neighbors that ZeRO divides over (`shard`; 0: all that have the same parts).
    """

    data: int
    sequence: int
    stage: int
    checkpointing: bool
    micro_batch: int
    batch: int
    experts: int = 1
    segments: int = 1
    exact: bool = True
    offloaded: bool = False
    tensor: int = 1
    shard: int = 0

    @property
    def ranks(self) -> int:
        return self.replicas * self.tensor

    @property
    def replicas(self) -> int:
        """Ranks that have the same parts of layers, among which ZeRO divides."""
        return self.data * self.sequence

    @property
    def shard_ranks(self) -> int:
        return self.shard or self.replicas

    @property
    def rounds(self) -> int:
        """Micro-batches one after the other."""
        return self.batch // (self.data * self.micro_batch)

    def __str__(self) -> str:
        again = ", recomputed" * self.checkpointing
        over = f", experts over {self.experts}" if self.experts > 1 else ""
        over += f", layers over {self.tensor}" if self.tensor > 1 else ""
        cut = f" in {self.segments} segments" if self.segments > 1 else ""
        rows = f"{self.micro_batch}/{self.batch} rows{cut}"
        stage = f"{self.stage} of {self.shard}" if self.shard else f"{self.stage}"
        return f"{self.data} x {self.sequence}, ZeRO {stage}, {rows}{again}{over}"

    def of_rounds(self, rounds: int) -> "Layout":
        """With a batch of so many micro-batches."""
        return replace(self, batch=self.data * self.micro_batch * rounds)

    def overrides(self) -> list[str]:
        """The launcher's words for it."""
        values: dict[str, Any] = {
            "parallel.data": self.data,
            "parallel.sequence": self.sequence,
            "parallel.zero_stage": self.stage,
            "model.activation_checkpointing": self.checkpointing,
            "train.micro_batch_size": self.micro_batch,
            "train.batch_size": self.batch,
        }
        if self.experts > 1:
            values["parallel.experts"] = self.experts
        parallel = ParallelConfig(
            data=self.data, sequence=self.sequence, tensor=self.tensor, experts=self.experts, zero_stage=self.stage
        )
        if self.tensor > 1:
            values["parallel.tensor"] = self.tensor
        if self.shard_ranks != parallel.shard_ranks:
            values["parallel.shard"] = self.shard_ranks
        return [f"{key}={str(value).lower()}" for key, value in values.items()]


@dataclass(frozen=True)
class Prediction:
    """`each`: seconds of one micro-batch, `once`: what a step adds to those of its micro-batches, `bytes`: of a rank;
    by what they are made of. `room`: bytes a rank may have.
    """

    layout: Layout
    each: dict[str, float]
    once: dict[str, float]
    bytes: dict[str, float]
    room: float

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step."""
        return {name: self.layout.rounds * seconds for name, seconds in self.each.items()} | self.once

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
    """The step of `layout`, given the counts of what runs on one rank at once: of a micro-batch or a segment of it.

    `scheme`: how states travel.
    """
    # Ranks of a node beyond its processors wait for each other.
    here = min(layout.ranks, cluster.node or layout.ranks)
    crowd = max(1.0, here / machine.processors) * (machine.beside if here > 1 else 1.0)
    # In segments a pass finds the states between them first.
    again = layout.checkpointing + (layout.segments > 1 and layout.exact)
    compute = compute_seconds(counts, machine, again=again, shards=layout.sequence)
    compute = {name: crowd * seconds for name, seconds in compute.items()}
    exchanged, reduced = communication_seconds(counts, layout, cluster, sum(compute.values()), scheme)
    updated = counts.trained / layout.shard_ranks if layout.stage else held_parameters(counts, layout) - counts.frozen
    once = {"gradient exchange": reduced, "optimizer": crowd * machine.optimizer * updated}
    room = machine.memory / here if machine.shared else machine.memory
    each = {name: layout.segments * seconds for name, seconds in (compute | exchanged).items()}
    return Prediction(layout, each, once, memory_bytes(counts, layout, machine), room)


def compute_seconds(counts: ModelCounts, machine: Machine, *, again: int, shards: int = 1) -> dict[str, float]:
    """Seconds of one micro-batch's forward and backward pass on one rank that waits for nobody, by cause.

    `again`: more passes forward through the layers, as where they are recomputed. `shards`: ranks per sequence, of
    which `counts` are one's.
    """
    total = dict.fromkeys((*CAUSES, "recomputation"), 0.0)
    product = machine.products[str(counts.dtype).removeprefix("torch.")]
    # Layers of a kind take as long.
    known: dict[tuple[int, float], dict[str, float]] = {}
    for part in counts.parts:
        factor = machine.efficiency.get(part.kind or part.part, 1.0)
        attends = any(exchange.heads for exchange in part.exchanges)
        if shards > 1 and not attends:
            # A shard finds how its states depend on those before it, too.
            factor *= machine.cut.get(part.kind, 1.0)
        directions = ((part.forward, part.executed_forward), (part.backward, part.executed_backward))
        for index, (recorded, executed) in enumerate(directions):
            alike = id(recorded.calls), executed
            if alike not in known:
                known[alike] = _part_seconds(recorded, executed, machine, product)
            taken = {name: factor * seconds for name, seconds in known[alike].items()}
            if attends:
                # A shard's queries see the keys of all shards: as many times the pairs, shared evenly.
                taken["attention"] *= shards
            for name, seconds in taken.items():
                total[name] += seconds
            if index == 0 and part.layer >= 0:
                total["recomputation"] += again * sum(taken.values())
    return total


def _part_seconds(recorded: Recorded, executed: float, machine: Machine, product: float) -> dict[str, float]:
    seconds = dict.fromkeys(CAUSES, 0.0)
    seconds["memory traffic"] = machine.fresh * _mapped_bytes(recorded, machine)
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
) -> tuple[dict[str, float], float]:
    """Seconds that exchanges add to `compute` seconds of a micro-batch, and those of the gradients' own."""
    exchanges = [exchange for part in counts.parts for exchange in part.exchanges]
    depth, numbers = max(1, len(counts.layers)), 4.0 * held_parameters(counts, layout)
    scans = [(exchange.shape, exchange.item) for exchange in exchanges if exchange.shape is not None]
    shape, item = max(
        scans,
        key=lambda scan: (scan[0].state_numbers + scan[0].transition_numbers) * scan[1],
        default=(AffineShape(1, 1, 1, identity=True), 4),
    )
    ranks = layout.sequence if scans else 1
    bare = Work(depth, compute / depth / 3, compute / depth * 2 / 3, shape, item=item)
    gathering = replace(bare, parameter_bytes=numbers / depth if layout.stage == 3 and layout.replicas > 1 else 0.0)
    reducing = replace(gathering, gradient_bytes=numbers - 4.0 * counts.frozen if layout.replicas > 1 else 0.0)
    # Without ZeRO-3 the first two are one.
    simulated = {
        each: float(
            simulate(cluster, each, scheme, ranks=ranks, replicas=layout.replicas // ranks, shard=layout.shard)[0]
        )
        for each in {bare, gathering, reducing}
    }
    passes, with_weights, whole = (simulated[each] for each in (bare, gathering, reducing))
    # Exchanges of halos, keys and values, and tokens for experts, not overlapped: forward, and gradients backward.
    costs = cluster.between if 0 < cluster.node < layout.sequence else cluster.inside
    others, far = 0.0, layout.sequence - 1
    for exchange in exchanges if far else ():
        if exchange.near:
            others += costs.latency + exchange.near * costs.byte
        if exchange.heads:
            others += exchange.rows * _attention_waits(layout.sequence, int(exchange.tokens), exchange.heads, costs) / 2
    # Tokens to experts and back; their counts go first.
    costs = cluster.between if 0 < cluster.node < layout.experts else cluster.inside
    away = layout.experts - 1
    for part in counts.parts if away else ():
        if part.experts:
            others += 3 * costs.latency * away + 2 * part.routed_bytes * away / layout.experts * costs.byte
    exchanged = {
        "sequence exchange": max(0.0, passes - compute) + 2 * others,
        "weights gathered": with_weights - passes,
    }
    if layout.tensor > 1:
        exchanged["tensor exchange"] = tensor_seconds(counts, layout, cluster)
    return exchanged, whole - with_weights


def tensor_seconds(counts: ModelCounts, layout: Layout, cluster: Cluster) -> float:
    """Seconds in which tensor-parallel ranks add up what enters and what leaves each part of a layer, once each way."""
    costs = cluster.between if 0 < cluster.node < layout.tensor else cluster.inside
    item = 2 if counts.dtype == torch.bfloat16 else 4
    size = counts.stream_bytes / 4 * item
    far = layout.tensor - 1
    # A ring: everything but a rank's own part twice.
    return 2 * len(counts.parts) * (2 * far * costs.latency + 2 * far / layout.tensor * size * costs.byte)


@cache
def _attention_waits(ranks: int, tokens: int, heads: Heads, costs: Costs) -> float:
    """Seconds of both passes, of a row of one document."""
    offsets = tuple(tokens * rank for rank in range(ranks + 1))
    return exposed(cheapest(offsets, (0, tokens * ranks), heads, costs), heads, costs)


def held_parameters(counts: ModelCounts, layout: Layout) -> float:
    """Numbers that a rank's weights have, before ZeRO divides anything: of sharded experts its own alone."""
    return counts.parameters - counts.experts * (1 - 1 / layout.experts)


def memory_bytes(counts: ModelCounts, layout: Layout, machine: Machine) -> dict[str, float]:
    """Bytes of one rank at the peak of a step, by kind."""
    again, own = layout.checkpointing, 1 / layout.shard_ranks
    # What ZeRO divides is, in all, the same with sharded experts.
    size, divided = 4.0 * held_parameters(counts, layout), 4.0 * counts.trained * own
    trained = size - 4.0 * counts.frozen
    whole, kept = counts.peak_bytes(checkpointing=again), counts.saved_bytes(checkpointing=again)
    bucket = min(trained, 4.0 * LARGEST_BUCKET) if layout.replicas > 1 or layout.stage else 0.0
    weights, gathered = size, 0.0
    if layout.stage == 3:
        bucket = min(bucket, size * own / 2, size / STAGE_3_PART)
        weights, gathered = 4.0 * counts.parameters * own, size * max(1 / STAGE_3_PART, 2 / max(1, len(counts.layers)))
    # ZeRO 1 and 2 keep a float32 copy of their part next to the weights, all the reduced gradients of their part.
    moments = divided * 3 if layout.stage in (1, 2) else divided * 2 if layout.stage else trained * 2
    reduced = divided if layout.stage else 0.0
    # From stage 2 on a rank's gradients leave with each bucket; the peak counts all of them.
    fewer = min(whole - kept, trained - divided) if layout.stage >= 2 else 0.0
    # Those of experts on other ranks, which are counted with the part they would be of.
    fewer += 4.0 * counts.parameters - size
    kinds = {
        "program": machine.base,
        "weights": weights + gathered,
        "optimizer": moments,
        "gradients reduced": reduced + bucket,
        "activations kept": 0.0 if layout.offloaded else kept,
        "temporaries and gradients": max(0.0, whole - kept - max(0.0, fewer)),
    }
    unused = zip(unused_bytes(counts, kinds, machine), (machine.unused_kept, machine.unused_passing), strict=True)
    return kinds | {"unused": sum(size * factor for size, factor in unused)}


def unused_bytes(counts: ModelCounts, kinds: dict[str, float], machine: Machine) -> tuple[float, float]:
    """Of the bytes by kind, those in blocks that the program keeps for others: kept, and passing."""
    made = [recorded for part in counts.parts for recorded in (part.forward, part.backward)]
    whole = sum(size * count for recorded in made for size, count in recorded.made.items())
    share = 1 - sum(_mapped_bytes(recorded, machine) for recorded in made) / whole
    return share * kinds["activations kept"], share * kinds["temporaries and gradients"]


def _mapped_bytes(recorded: Recorded, machine: Machine) -> float:
    above = machine.mapped_above or math.inf
    return sum(size * count for size, count in recorded.made.items() if size > above)
