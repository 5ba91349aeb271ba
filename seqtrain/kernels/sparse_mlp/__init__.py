"""The part of a sparse MLP that costs most: hidden channels whose gate is zero are neither made nor read."""

import torch
from torch import Tensor

from seqtrain.kernels.operator import operator, rows_of


@operator(
    arguments={"gate": "... F", "x": "... K", "value": "F K", "down": "F D"},
    out="... D",
    # As if all were kept: how many are depends on numbers.
    flops=lambda *, F, K, D, **sizes: rows_of(sizes) * 2 * F * (K + D),
    backends=("reference", "chunked", "native"),
)
def sparse_mlp(gate: Tensor, x: Tensor, value: Tensor, down: Tensor, *, backend: str = "auto") -> Tensor:
    """`out = (gate * (x value^T)) down`: an MLP whose hidden channels a gate weighs, most of them by zero.

    `gate`: `[...,F]`. `x`: `[...,K]`. `value`: `[F,K]` and `down`: `[F,D]`, so that a hidden channel's weights are two
    rows. All floating. Returns `[...,D]` in x's dtype; sums are float32 at least. Raises `ValueError` for a wrong
    shape, dtype, device or backend. Backends: `reference`, `chunked` (all channels, by matrix products), `native` (the
    kept channels alone, where few rows are decoded without gradients; otherwise as `chunked`).
    """
    sparse_mlp.check((gate, x, value, down))
    return sparse_mlp.choose(backend, x.device)(gate, x, value, down)


def reference(gate: Tensor, x: Tensor, value: Tensor, down: Tensor) -> Tensor:
    """The definition."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, value, down = (each.to(wide) for each in (gate, value, down))
    return torch.einsum("...f,...k,fk,fd->...d", gate, x.to(wide), value, down).to(x.dtype)
