"""A stand-in for a model: layers of slept compute with one All-Scan each, forward and backward through autograd."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.benchmarks.scan_methods import CPU, Setting
from seqtrain.parallel import open_all_scan
from seqtrain.parallel.schedules import SCHEDULES
from seqtrain.planning.scaling import Scheme

# How the layers of a step hand their states on; None: not at all.
CHAINS: dict[str, Scheme | None] = {
    "compute alone": None,
    "auto": Scheme(),
    "auto, not overlapped": Scheme(overlapped=False),
    "auto, a barrier a layer": Scheme(barrier=True),
    **{name: Scheme(name) for name in SCHEDULES},
}


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
    """A training step of `layers` layers, each computing `setting.compute` seconds forward and as long backward."""

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
    opened = open_all_scan(
        None if transition is None else transition.shape,
        x.shape,
        dtype=x.dtype,
        device=CPU,
        group=setting.group,
        algorithm=chain.schedule,
    )
    scan = opened.start(transition, 0.5 * x)
    if chain.overlapped:
        local = _BothWays.apply(x, slept)
        out = 0.5 * (local + scan.wait()[0])
    else:
        out = _BothWays.apply(0.5 * (x + scan.wait()[0]), slept)
    return _BothWays.apply(out, partial(dist.barrier, group=setting.group)) if chain.barrier else out
