"""Activations that wait for the backward pass in the CPU's memory."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

# Numbers below which a tensor stays where it is: a copy would take longer than the memory is worth.
LEAST = 2**14


class Offloaded(saved_tensors_hooks):
    """A context in which what autograd saves is copied to the CPU, as `save_on_cpu` does; weights stay."""

    def __init__(self, *, least: int = LEAST) -> None:
        moved = save_on_cpu(pin_memory=True)

        def pack(x: Tensor) -> Any:
            own = x if x._base is None else x._base
            stays = x.numel() < least or isinstance(own, nn.Parameter)
            return x if stays else moved.pack_hook(x)

        def unpack(saved: Any) -> Tensor:
            found: Tensor = saved if isinstance(saved, Tensor) else moved.unpack_hook(saved)
            return found

        super().__init__(pack, unpack)


def offload_activations(model: nn.Module) -> None:
    """Has `model`'s forward passes run in an `Offloaded` context."""
    forward = model.forward

    def offloaded(*arguments: Any, **options: Any) -> Any:
        with Offloaded() if torch.is_grad_enabled() else nullcontext():
            return forward(*arguments, **options)

    model.forward = offloaded
