"""gated_norm: cases for its kernels, gradients of zeros, and what it refuses."""

import pytest
import torch

from seqtrain.kernels import gated_norm
from seqtrain.testing import relative_error


def case(width, *, own, gate):
    """Tensors (float64) and options: rows [2,5,3,width], weights per head where `own`, a gate and its place by name."""
    generator = torch.Generator().manual_seed(width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {"x": 3 * normal(2, 5, 3, width), "weight": normal(*([3, width] if own else [width]))}
    if gate != "none":
        tensors["gate"] = normal(2, 5, 3, width)
    activation = "sigmoid" if gate == "sigmoid" else "silu"
    return tensors, {"eps": 1e-6, "activation": activation, "gate_first": gate == "first"}


def errors_of(backend, tensors, options, dtype):
    """Relative errors of the output and of every gradient on inputs rounded to `dtype`; weights stay float32."""
    d_out = torch.randn(tensors["x"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    d_out = d_out.to(tensors["x"].device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    rounded = {name: x.to(wide if name == "weight" else dtype) for name, x in tensors.items()}
    results = []
    for name, inputs in ((backend, rounded), ("reference", {key: x.double() for key, x in rounded.items()})):
        leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
        out = gated_norm(**leaves, backend=name, **options)
        grads = torch.autograd.grad(out, list(leaves.values()), d_out.to(out.dtype))
        results.append({"out": out} | {f"grad {key}": grad for key, grad in zip(leaves, grads, strict=True)})
    came, expected = results
    return {name: relative_error(came[name], expected[name]) for name in expected}


def test_zeros_have_a_gradient():
    x = torch.zeros(1, 2, 1, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(gated_norm(x, torch.ones(8), eps=1e-6).sum(), x)
    assert grad.isfinite().all()


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation='gelu', expected 'silu' or 'sigmoid'"):
        gated_norm(torch.zeros(2, 3, 4), torch.zeros(4), eps=1e-6, activation="gelu")
