"""SwiGLU: what stands between the two matrices of a gated MLP."""

from torch import Tensor

from seqtrain.kernels.operator import operator


@operator(arguments={"up": "... S H"}, out="... H", flops=lambda **_: 0, backends=("reference", "chunked", "native"))
def swiglu(up: Tensor, *, backend: str = "auto") -> Tensor:
    """`silu(gate) * value` (Shazeer 2020, arXiv 2002.05202) of `up: [...,2,H]`, gates and values, floating: `[...,H]`.

    Computed in float32 at least on CPUs, and returned in up's dtype. Raises `ValueError` for a wrong shape, dtype or
    backend.
    """
    if up.dim() < 2 or up.shape[-2] != 2 or not up.is_floating_point():
        swiglu.check((up,))
        raise ValueError(f"swiglu: up has shape {tuple(up.shape)}, expected [...,2,H]")
    return swiglu.choose(backend, up.device)(up)


def reference(up: Tensor) -> Tensor:
    """The definition."""
    gate, value = up.unbind(-2)
    return gate / (1 + (-gate).exp()) * value
