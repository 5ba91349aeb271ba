"""The softmax kernel of the cross-entropy: loss and gradients, vocabularies of several blocks, ignored rows."""

import pytest
import torch

from seqtrain.kernels import linear_cross_entropy
from seqtrain.kernels.inspect.interpreter import assert_no_races, nan_filled_empty, recording
from seqtrain.testing import relative_error
from tests.kernels.test_linear_cross_entropy import ROWS, WIDTH, case, expected


def errors_of(hidden, weight, labels, scale=1.0):
    with nan_filled_empty():
        loss = linear_cross_entropy(hidden, weight, labels, chunk=16, backend="triton")
        came = [loss, *torch.autograd.grad(loss * scale, (hidden, weight))]
    return [relative_error(a, b) for a, b in zip(came, expected(hidden, weight, labels, scale), strict=True)]


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 6e-3), (torch.float16, 1.5e-3)]
)
def test_loss_and_gradients(dtype, limit):
    with recording(order="shuffled") as launches:
        errors = errors_of(*case(dtype), scale=1 / 3)
    assert max(errors) < limit, errors
    assert len(launches) == -(-ROWS // 16)
    assert_no_races(launches)


def test_a_vocabulary_of_several_blocks():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9000, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    assert max(errors_of(hidden, weight, torch.tensor([8999, -100, 4096]))) < 1e-12


def test_large_logits_stay_finite():
    hidden, weight, labels = case(torch.float32)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    assert max(errors_of(hidden, weight, labels)) < 1e-5


def test_without_gradients_logits_are_left_alone():
    hidden, weight, labels = case(torch.float32)
    with torch.no_grad(), recording() as launches:
        loss = linear_cross_entropy(hidden, weight, labels, chunk=64, backend="triton")
    assert relative_error(loss, expected(hidden, weight, labels)[0]) < 2e-6
    assert launches[0].traffic["logits"].written == 0
