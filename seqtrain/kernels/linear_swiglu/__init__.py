"""The first half of a gated MLP in one pass: SwiGLU in the epilogue of its product (CODA, arXiv 2605.19269)."""

import torch
from torch import Tensor

from seqtrain.kernels.operator import operator, rows_of


@operator(
    arguments={"x": "... K", "weight": "S H K"},
    out="... H",
    flops=lambda *, S, H, K, **sizes: rows_of(sizes) * 2 * S * H * K,
    backends=("reference", "chunked", "triton"),
)
def linear_swiglu(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """`silu(x G^T) * (x V^T)` of `weight: [2,H,K]`, G and V: what enters an MLP's last matrix, `[...,H]`.

    `x`: `[...,K]`, floating, in whose dtype products are (sums are float32) and which the result has. As two operations
    `5 H` numbers a token are moved besides `x`: `2 H` are written, read again, and H written. In the product's epilogue
    H are written, and `2 H` more where the backward pass will need them. Raises `ValueError` for a wrong shape, dtype
    or device. Backends: `reference`, `chunked` (a product, then `swiglu`), `triton`.
    """
    if weight.dim() != 3 or weight.shape[0] != 2:
        linear_swiglu.check((x, weight))
        raise ValueError(f"linear_swiglu: weight has shape {tuple(weight.shape)}, expected [2,H,K]")
    linear_swiglu.check((x, weight))
    return linear_swiglu.choose(backend, x.device)(x, weight)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """The definition."""
    gate, value = (torch.einsum("...k,hk->...h", x, each.to(x.dtype)) for each in weight.unbind(0))
    return gate / (1 + (-gate).exp()) * value
