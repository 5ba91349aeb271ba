"""The ways to hand states from rank to rank that are compared: single scans, and steps of a stand-in for a model."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape
from seqtrain.parallel import Algorithm, open_all_scan
from seqtrain.parallel.cost import Costs, costs_of
from seqtrain.parallel.scan import plan_scan
from seqtrain.parallel.scan_engine import engine_of
from seqtrain.parallel.schedules import SCHEDULES
from seqtrain.parallel.schedules.base import packed, unpacked
from seqtrain.planning.scaling import Scheme

CPU = torch.device("cpu")
BLOCKS = (1, 2, 4, 8, 16, 32, 64)
# How the layers of a step hand their states on; None: not at all.
CHAINS: dict[str, Scheme | None] = {
    "compute alone": None,
    "auto": Scheme(),
    "auto, not overlapped": Scheme(overlapped=False),
    "auto, a barrier a layer": Scheme(barrier=True),
    **{name: Scheme(name) for name in SCHEDULES},
}


def map_shapes(form: str, kib: float, width: int) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Shapes of transition and update for a float32 state of about `kib` KiB in heads of `[width, width]`."""
    update = (1, max(1, round(kib * 1024 / 4 / width**2)), width, width)
    return (None if form == "none" else update[: {"head": 2, "channel": 3, "dense": 4}[form]]), update


def group_costs(group: dist.ProcessGroup) -> Costs:
    """What scans cost on this group; the first time all its ranks measure."""
    return costs_of(engine_of(group.group_name), CPU)


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

    def open(self, algorithm: Any, blocks: int | None = None) -> Any:
        """An All-Scan of these shapes, its receives posted."""
        transition, update = self.transition, self.update
        shapes = None if transition is None else transition.shape, update.shape
        how: dict[str, Any] = {"group": self.group, "algorithm": algorithm, "blocks": blocks}
        return open_all_scan(*shapes, dtype=update.dtype, device=CPU, **how)


@dataclass(frozen=True)
class Contender:
    """A method, the bytes its busiest rank receives, and the cost model's seconds where there is a model.

    A method prepares what may be ready before the clock starts, and returns what is timed.
    """

    method: Callable[[Setting], Callable[[], object]]
    payload: int
    expected: float | None


def contenders(setting: Setting) -> dict[str, Contender]:
    """All that can run on this setting, by name: schedules of All-Scan, then what others do ("their ...")."""
    engine, costs = engine_of(setting.group.group_name), group_costs(setting.group)
    ranks, shape, dtype = setting.group.size(), setting.shape, setting.update.dtype
    item = dtype.itemsize
    wanted: list[tuple[str, Algorithm, int | None]] = [("auto", "auto", None)]
    wanted += [(f"pipeline {blocks}", "pipeline", blocks) for blocks in BLOCKS]
    wanted += [(name, name, None) for name in SCHEDULES if name != "pipeline"]
    found = {}
    for name, algorithm, blocks in wanted:
        plan = plan_scan(engine, shape, dtype, CPU, name)
        chained = setting.compute * (ranks if plan.blocking else 0)
        expected = max(plan.seconds(costs, shape, ranks, item) + chained, setting.compute)
        method = partial(scan, algorithm=algorithm, blocks=blocks)
        label = f"auto = {plan.name} {plan.blocks}" if name == "auto" else name
        found[label] = Contender(method, max(plan.payload_bytes(shape, ranks, item)), expected)
    everything = (ranks - 1) * (shape.state_numbers + shape.transition_numbers) * item
    found["their all-gather"] = Contender(gathered, everything, None)
    found["their ring"] = Contender(ring, shape.state_numbers * item, None)
    _, heads, width, values = setting.update.shape
    if heads % ranks == 0:
        activations = setting.tokens * heads * (2 * width + 2 * values) * item
        payload = activations * (ranks - 1) // ranks
        found[f"their all-to-all, {setting.tokens} tokens"] = Contender(swapped, payload, None)
    return found


def scan(setting: Setting, algorithm: Algorithm, blocks: int | None = None) -> Callable[[], object]:
    """All-Scan itself: receives are posted before the clock starts, as they are while a rank computes its update."""
    early = setting.open(algorithm, blocks)

    def timed() -> object:
        under_way = early.start(setting.transition, setting.update)
        time.sleep(setting.compute)
        return under_way.wait()

    return timed


def gathered(setting: Setting) -> Callable[[], object]:
    """LASP-2, flash-linear-attention: an all-gather of updates and transitions, folded by every rank."""
    own, shape = setting.map, setting.shape
    message = packed(own, shape, state_only=False)
    everyone = [torch.empty_like(message) for _ in range(setting.group.size())]

    def timed() -> object:
        work = dist.all_gather(everyone, message, group=setting.group, async_op=True)
        time.sleep(setting.compute)
        assert work is not None, "this rank is in the group"
        work.wait()
        state = torch.zeros_like(own.update)
        for other in everyone[: setting.group.rank()]:
            state = unpacked(other, shape, state_only=False).apply(state)
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


class _BothWays(torch.autograd.Function):
    """The identity, calling `action()` forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, action: Callable[[], object]) -> Tensor:
        ctx.action = action
        action()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.action()
        return gradients[0], None


def step(setting: Setting, layers: int, chain: Scheme | None) -> Callable[[], object]:
    """A training step of `layers` layers with one scan each, forward and backward through autograd.

    Each layer computes (sleeps) `setting.compute` seconds forward and as long backward.
    """

    def timed() -> object:
        x = first = setting.update.clone().requires_grad_()
        transition = None if setting.transition is None else setting.transition.clone().requires_grad_()
        for _ in range(layers):
            x = _layer(x, transition, setting, chain)
        x.sum().backward()
        return first.grad

    return timed


def _layer(x: Tensor, transition: Tensor | None, setting: Setting, chain: Scheme | None) -> Tensor:
    slept = partial(time.sleep, setting.compute)
    if chain is None:
        return _BothWays.apply(x, slept)
    scan = setting.open(chain.schedule).start(transition, 0.5 * x)
    if chain.overlapped:
        local = _BothWays.apply(x, slept)
        out = 0.5 * (local + scan.wait()[0])
    else:
        out = _BothWays.apply(0.5 * (x + scan.wait()[0]), slept)
    return _BothWays.apply(out, partial(dist.barrier, group=setting.group)) if chain.barrier else out
