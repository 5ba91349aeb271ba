"""The ways to hand states from rank to rank that the benchmark of All-Scan compares, on the same local work."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape
from seqtrain.parallel import Algorithm, open_all_scan
from seqtrain.parallel.cost import costs_of
from seqtrain.parallel.scan import plan_scan
from seqtrain.parallel.scan_engine import engine_of
from seqtrain.parallel.schedules import SCHEDULES

CPU = torch.device("cpu")
BLOCKS = (1, 2, 4, 8, 16, 32, 64)


def map_shapes(form: str, kib: float, width: int) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Shapes of transition and update for a float32 state of about `kib` KiB in heads of `[width, width]`."""
    heads = max(1, round(kib * 1024 / 4 / width**2))
    shapes: dict[str, tuple[int, ...] | None] = {
        "none": None,
        "head": (1, heads),
        "channel": (1, heads, width),
        "dense": (1, heads, width, width),
    }
    return shapes[form], (1, heads, width, width)


@dataclass(frozen=True)
class Setting:
    """What every method is given: this rank's map, its tokens, and its stand-in for local work in seconds."""

    group: dist.ProcessGroup
    transition: Tensor | None
    update: Tensor
    tokens: int
    compute: float

    @classmethod
    def random(
        cls, group: dist.ProcessGroup, form: str, kib: float, width: int, *, tokens: int, compute: float
    ) -> "Setting":
        """A float32 state of about `kib` KiB in heads of `[width, width]`, another on every rank."""
        transition_shape, update_shape = map_shapes(form, kib, width)
        generator = torch.Generator().manual_seed(group.rank())
        transition = None if transition_shape is None else torch.rand(transition_shape, generator=generator) / width
        return cls(group, transition, torch.randn(update_shape, generator=generator), tokens, compute)

    @property
    def shape(self) -> AffineShape:
        return AffineShape.of(self.update.shape, None if self.transition is None else self.transition.shape)

    @property
    def map(self) -> AffineMap:
        return AffineMap(self.shape.transition(self.transition), self.shape.state(self.update))


# A method prepares what may be ready before the clock starts, and returns what is timed.
Method = Callable[[Setting], Callable[[], object]]


@dataclass(frozen=True)
class Contender:
    """A method, the bytes its busiest rank receives, and the cost model's seconds where there is a model."""

    method: Method
    payload: int
    expected: float | None


def contenders(setting: Setting) -> dict[str, Contender]:
    """All that can run on this setting, by name: schedules of All-Scan, then what others do ("their ...")."""
    found = _schedules(setting)
    ranks, shape, item = setting.group.size(), setting.shape, setting.update.dtype.itemsize
    everything = (ranks - 1) * (shape.state_numbers + shape.transition_numbers) * item
    found["their all-gather"] = Contender(gathered, everything, None)
    found["their ring"] = Contender(ring, shape.state_numbers * item, None)
    _, heads, width, values = setting.update.shape
    if heads % ranks == 0:
        activations = setting.tokens * heads * (2 * width + 2 * values) * item
        name = f"their all-to-all, {setting.tokens} tokens"
        found[name] = Contender(swapped, activations * (ranks - 1) // ranks, None)
    return found


def _schedules(setting: Setting) -> dict[str, Contender]:
    engine = engine_of(setting.group.group_name)
    costs = costs_of(engine, CPU)
    ranks, shape, dtype = setting.group.size(), setting.shape, setting.update.dtype
    wanted: list[tuple[str, Algorithm, int | None]] = [("auto", "auto", None)]
    wanted += [(f"pipeline {blocks}", "pipeline", blocks) for blocks in BLOCKS]
    wanted += [(name, name, None) for name in SCHEDULES if name != "pipeline"]
    found = {}
    for name, algorithm, blocks in wanted:
        plan = plan_scan(engine, shape, dtype, CPU, name)
        payload = max(plan.payload_bytes(shape, ranks, dtype.itemsize))
        chained = setting.compute * (ranks if plan.blocking else 0)
        expected = max(plan.seconds(costs, shape, ranks, dtype.itemsize) + chained, setting.compute)
        label = f"auto = {plan.name} {plan.blocks}" if name == "auto" else name
        found[label] = Contender(partial(scan, algorithm=algorithm, blocks=blocks), payload, expected)
    return found


def scan(setting: Setting, algorithm: Algorithm, blocks: int | None) -> Callable[[], object]:
    """All-Scan itself: receives are posted before the clock starts, as they are while a rank computes its update."""
    transition_shape = None if setting.transition is None else setting.transition.shape
    early = open_all_scan(
        transition_shape,
        setting.update.shape,
        dtype=setting.update.dtype,
        device=CPU,
        group=setting.group,
        algorithm=algorithm,
        blocks=blocks,
    )

    def timed() -> object:
        under_way = early.start(setting.transition, setting.update)
        time.sleep(setting.compute)
        return under_way.wait()

    return timed


def gathered(setting: Setting) -> Callable[[], object]:
    """LASP-2, flash-linear-attention: an all-gather of updates and transitions, folded by every rank."""
    own = setting.map
    packed = torch.cat([part.reshape(-1) for part in (own.update, own.transition) if part is not None])
    ranks, rank = setting.group.size(), setting.group.rank()
    everyone = [torch.empty_like(packed) for _ in range(ranks)]

    def timed() -> object:
        work = dist.all_gather(everyone, packed, group=setting.group, async_op=True)
        time.sleep(setting.compute)
        assert work is not None, "this rank is in the group"
        work.wait()
        state = torch.zeros_like(own.update)
        for other in everyone[:rank]:
            update, transition = other[: state.numel()], other[state.numel() :]
            theirs = AffineMap(
                None if own.transition is None else setting.shape.transition(transition), setting.shape.state(update)
            )
            state = theirs.apply(state)
        return own.apply(state)

    return timed


def ring(setting: Setting) -> Callable[[], object]:
    """LASP: a chain of blocking receives and sends, local work on the chain."""
    own, rank, last = setting.map, setting.group.rank(), setting.group.size() - 1

    def timed() -> object:
        state = torch.zeros_like(own.update)
        if rank > 0:
            dist.recv(state, group=setting.group, group_src=rank - 1)
        time.sleep(setting.compute)
        out = own.apply(state)
        if rank < last:
            dist.send(out, group=setting.group, group_dst=rank + 1)
        return out

    return timed


def swapped(setting: Setting) -> Callable[[], object]:
    """Ulysses: q, k, v of a rank's tokens go to the ranks of their heads, outputs come back; heads must divide."""
    _, heads, width, values = setting.update.shape
    ranks = setting.group.size()
    going = torch.zeros(ranks, setting.tokens, heads // ranks, 2 * width + values)
    coming = torch.zeros(ranks, setting.tokens, heads // ranks, values)

    def timed() -> object:
        arrived, back = torch.empty_like(going), torch.empty_like(coming)
        dist.all_to_all_single(arrived, going, group=setting.group)
        time.sleep(setting.compute)
        dist.all_to_all_single(back, coming, group=setting.group)
        return back

    return timed
