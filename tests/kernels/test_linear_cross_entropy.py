"""linear_cross_entropy: loss and gradients against PyTorch's on whole logits, ignored labels, autocast, memory."""

import pytest
import torch
import torch.nn.functional as F

from seqtrain.kernels import linear_cross_entropy
from seqtrain.testing import relative_error

ROWS, WIDTH, VOCAB = 50, 16, 97


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    labels[3:9] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def expected(hidden, weight, labels, scale=1.0):
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    return [loss, *torch.autograd.grad(loss * scale, (hidden, weight))]


@pytest.mark.parametrize("scale", [1.0, 1 / 3, -0.37])
@pytest.mark.parametrize("chunk", [1, 7, ROWS, 1000])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_loss_and_gradients(dtype, limit, chunk, scale):
    hidden, weight, labels = case(dtype)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    assert loss.dtype == dtype
    came = [loss, *torch.autograd.grad(loss * scale, (hidden, weight))]
    errors = [relative_error(a, b) for a, b in zip(came, expected(hidden, weight, labels, scale), strict=True)]
    assert max(errors) < limit, errors


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_bfloat16_under_autocast_and_without(scale):
    hidden, weight, labels = case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, chunk=16)
    assert loss.dtype == torch.float32
    came = torch.autograd.grad(loss * scale, (hidden, weight))
    assert [x.dtype for x in came] == [torch.float32, torch.float32]
    errors = [relative_error(a, b) for a, b in zip((loss, *came), expected(hidden, weight, labels, scale), strict=True)]
    assert 1e-5 < max(errors) < 1e-2, errors  # above rounding of float32: the products were bfloat16

    hidden, weight, labels = case(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=16)
    came = torch.autograd.grad(loss * scale, (hidden, weight))
    assert [loss.dtype, *(x.dtype for x in came)] == [torch.float32, torch.bfloat16, torch.bfloat16]
    errors = [relative_error(a, b) for a, b in zip((loss, *came), expected(hidden, weight, labels, scale), strict=True)]
    assert max(errors) < 1e-2, errors


def test_a_bfloat16_gradient_takes_its_scale_in_float32():
    hidden, weight, labels = case(torch.bfloat16)
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, chunk=16), weight)[0].double()
    scale = 1.0 + 1 / 300  # 1.0 in bfloat16
    scaled = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, chunk=16) * scale, weight)[0].double()
    assert (scaled.norm() / whole.norm() - scale).abs() < 1e-3


@pytest.mark.parametrize(("of_hidden", "of_weight"), [(True, False), (False, True), (False, False)])
def test_only_the_gradients_asked_for(of_hidden, of_weight):
    hidden, weight, labels = case()
    values = expected(hidden, weight, labels)
    hidden, weight = hidden.detach().requires_grad_(of_hidden), weight.detach().requires_grad_(of_weight)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=16)
    assert relative_error(loss, values[0]) < 1e-13
    assert loss.requires_grad == (of_hidden or of_weight)
    if loss.requires_grad:
        loss.backward()
    for x, gradient in ((hidden, values[1]), (weight, values[2])):
        assert (x.grad is None) != x.requires_grad
        assert x.grad is None or relative_error(x.grad, gradient) < 1e-13


def test_the_weight_is_not_needed_after_the_forward_pass():
    hidden, weight, labels = case()
    values = expected(hidden, weight, labels)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=16)
    with torch.no_grad():
        weight.fill_(torch.nan)  # as ZeRO-3 frees a gathered parameter
    loss.backward()
    assert relative_error(hidden.grad, values[1]) < 1e-13


def test_no_labels_at_all_is_zero():
    hidden, weight, labels = case()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), chunk=16)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_large_logits_stay_finite():
    hidden, weight, labels = case(torch.float32)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, chunk=16)
    came = [loss, *torch.autograd.grad(loss, (hidden, weight))]
    errors = [relative_error(a, b) for a, b in zip(came, expected(hidden, weight, labels), strict=True)]
    assert max(errors) < 1e-5, errors


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of elements of the largest tensor any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_whole_logits_never_exist():
    hidden, weight, labels = case(torch.float32)
    with _LargestTensor() as seen:
        linear_cross_entropy(hidden, weight, labels, chunk=8).backward()
    assert seen.largest <= max(8 * VOCAB, VOCAB * WIDTH)
    assert seen.largest < ROWS * VOCAB
