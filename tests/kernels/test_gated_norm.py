"""gated_norm: its PyTorch form against the definition, gradients, and what it refuses."""

import pytest
import torch

from seqtrain.kernels import gated_norm


def test_zeros_have_a_gradient():
    x = torch.zeros(1, 2, 1, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(gated_norm(x, torch.ones(8), eps=1e-6).sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5)}, r"weight has shape \(5,\), expected \[V\] with V=4"),
        ({"gate": torch.zeros(2, 8)}, r"gate has shape \(2, 8\), expected \[H, V\] with H=3"),
        ({"activation": "gelu"}, "activation='gelu', expected 'silu' or 'sigmoid'"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int64)}, "x has dtype torch.int64"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(2, 3, 4), "weight": torch.zeros(4)} | change
    with pytest.raises(ValueError, match=message):
        gated_norm(**arguments, eps=1e-6)
