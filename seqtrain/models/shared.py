"""Blocks of attention and an MLP that several layers share, each with low-rank adapters of its own: Zamba2."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from seqtrain.layers import Linear
from seqtrain.mixers import Mixer, SequenceContext, State
from seqtrain.models.feed_forward import MLP

# Before the names of a shared block's states in those of its layer.
PREFIX = "shared_"


@dataclass(frozen=True)
class SharedConfig:
    """The keys under `model.shared.`: blocks of softmax attention and an MLP that layers have besides (Zamba2)."""

    # The shared block that adds to what each layer's mixer is given, from 1 on, repeated over the depth; 0: none.
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    # The softmax mixer in them, which is as wide as twice the model; its keys are under mixer.
    mixer: str = "attention"
    # Rank of what each layer adds to the MLP's first matrix; 0: nothing. The mixer's own is its adapter_rank.
    adapter_rank: Annotated[int, Field(ge=0)] = 0

    def block(self, index: int) -> int:
        """The shared block of layer `index`."""
        return self.layers[index % len(self.layers)]


class SharedBlock(nn.Module):
    """`W mlp(norm(attention(norm([x, e]))))`, e: what entered the first layer (Glorioso et al. 2024, arXiv 2411.15242).

    One for each layer that uses it: layers of one block hold the same parameters, but for adapters and W.
    """

    def __init__(self, attention: Mixer, mlp: MLP, norm: Callable[[int], nn.Module], width: int):
        super().__init__()
        self.attention_norm = norm(2 * width)
        self.attention = attention
        self.mlp_norm = norm(width)
        self.mlp = mlp
        self.out = Linear(width, width, bias=False)

    def hold(self, other: "SharedBlock") -> None:
        """Takes the parameters of `other` for its own, where they are shared."""
        for path, module in self.named_modules():
            if module is not self.out and "adapter" not in path.split("."):
                for name, _ in list(module.named_parameters(recurse=False)):
                    setattr(module, name, getattr(other.get_submodule(path), name))

    def forward(self, x: Tensor, first: Tensor, state: State, sequence: SequenceContext) -> tuple[Tensor, State]:
        """`x`, `first`: `[B,T,D]`, or `[B,D]` for one token per row -> the same, and the attention's state."""
        attend = self.attention if x.dim() == 3 else self.attention.step
        y, state = attend(self.attention_norm(torch.cat([x, first], -1)), state or None, sequence=sequence)
        return self.out(self.mlp(self.mlp_norm(y))), state

    def flops(self, tokens: int) -> int:
        """Forward pass over one sequence."""
        return self.attention.flops(tokens) + self.mlp.flops(tokens) + 2 * tokens * self.out.weight.numel()
