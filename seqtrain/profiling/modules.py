"""Which part of a model is running, told by hooks on its modules and on the gradients that come back through them."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.layers import RMSNorm
from seqtrain.mixers import Mixer
from seqtrain.models.block import Block
from seqtrain.models.feed_forward import MLP, MoE
from seqtrain.models.language_model import Embedding, Head
from seqtrain.profiling.parts import BACKWARD, FORWARD, RECOMPUTATION, Part, Timeline

# What the modules of a model are called; a mixer has its own name. A block's own work is its two additions.
KINDS: dict[type[nn.Module], str] = {
    Block: "norm, residual",
    RMSNorm: "norm, residual",
    MLP: "mlp",
    MoE: "mlp",
    Embedding: "embedding",
    Head: "loss",
}


def mixer_name(mixer: Mixer) -> str:
    """The name `model.layers` knows it by."""
    return type(mixer).__module__.rpartition(".")[2]


def watched_modules(model: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """The modules that are parts of their own, with kind and layer. What lies inside a mixer or an MLP is its own."""
    found: list[tuple[nn.Module, str, int]] = []
    closed: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(closed):
            continue
        kind = mixer_name(module) if isinstance(module, Mixer) else KINDS.get(type(module), "")
        if not kind:
            continue
        if not isinstance(module, Block):
            closed = (*closed, f"{name}.")
        layer = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        found.append((module, kind, int(layer[1]) if layer else -1))
    return found


@contextmanager
def watched_model(model: nn.Module, timeline: Timeline) -> Iterator[None]:
    """While open, `timeline` follows the modules of `model` forward, backward and in recomputation.

    A module's backward part begins when the gradient of its output is complete and ends where another's begins, so it
    includes the gradients of its weights. The backward pass must run on this thread.
    """
    handles = []
    for module, kind, layer in watched_modules(model):
        enter, leave = _hooks(timeline, *(Part(kind, phase, layer) for phase in (FORWARD, RECOMPUTATION, BACKWARD)))
        # First of all hooks: what others do before a module, such as gathering its weights, is part of it.
        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        # Always: the end of a recomputation is an exception.
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(timeline: Timeline, forward: Part, again: Part, backward: Part) -> tuple[Callable, Callable]:
    """What is called before a module and after it."""

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        # A pass that keeps nothing for a backward pass is one that will be made again.
        timeline.enter(again if in_backward() or not torch.is_grad_enabled() else forward)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        timeline.leave()
        first = output[0] if isinstance(output, tuple) else output
        # The graph of a recomputation is never run backward; its values take the places of those that were dropped.
        if isinstance(first, Tensor) and first.requires_grad and not in_backward():
            first.register_hook(lambda gradient: timeline.switch(backward))

    return enter, leave


def in_backward() -> bool:
    """Whether autograd is running a backward pass on this thread."""
    return torch._C._current_graph_task_id() >= 0
