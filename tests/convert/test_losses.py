"""Losses towards a teacher are those of their definitions; gradients found ahead are those of the backward pass."""

import pytest
import torch
import torch.nn.functional as F

from seqtrain.convert.losses import distillation_sum, mean_square_sum, relative_error_sum, with_gradients

VOCABULARY, WIDTH, TOKENS = 37, 6, 10


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def some_case():
    torch.manual_seed(0)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[[0, 7]] = -100
    hidden, weight = draw(TOKENS, WIDTH).requires_grad_(), draw(VOCABULARY, WIDTH).requires_grad_()
    return hidden, weight, draw(TOKENS, WIDTH), draw(VOCABULARY, WIDTH), labels


def defined(hidden, weight, expected, expected_weight, labels, *, kl, ce, temperature):
    """The loss with all logits at once, by torch's own functions."""
    counted = labels != -100
    logits, teacher = (hidden @ weight.T)[counted], (expected @ expected_weight.T)[counted]
    p, log_q = (teacher / temperature).softmax(-1), (logits / temperature).log_softmax(-1)
    divergence = F.kl_div(log_q, p, reduction="sum") * temperature**2
    return kl * divergence + ce * F.cross_entropy(logits, labels[counted], reduction="sum")


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize(("kl", "ce", "temperature"), [(1.0, 0.0, 1.0), (0.0, 2.0, 1.0), (0.7, 0.3, 2.5)])
def test_distillation_is_its_definition(kl, ce, temperature, chunk):
    case = some_case()
    options = {"kl": kl, "ce": ce, "temperature": temperature}
    expected = defined(*case, **options)
    wanted = torch.autograd.grad(3 * expected, case[:2])
    teacher = case[2:4] if kl else (None, None)
    loss = distillation_sum(*case[:2], *teacher, case[4], **options, chunk=chunk)
    came = torch.autograd.grad(3 * loss, case[:2])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for one, other in zip(came, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_head_that_is_not_trained_has_no_gradient_and_none_is_made_without_training():
    hidden, weight, expected, expected_weight, labels = some_case()
    options = {"kl": 1.0, "ce": 1.0, "temperature": 1.0, "chunk": 4}
    loss = distillation_sum(hidden, weight.detach(), expected, expected_weight, labels, **options)
    loss.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not distillation_sum(hidden, weight, expected, expected_weight, labels, **options).requires_grad


def test_errors_count_each_labelled_token_once():
    torch.manual_seed(0)
    expected, came = draw(1, 4, WIDTH), draw(1, 4, WIDTH)
    labels = torch.tensor([[3, -100, 5, 6]])
    relative = sum(((came - expected)[0, t].norm() / expected[0, t].norm()) ** 2 for t in (0, 2, 3))
    square = sum((came - expected)[0, t].square().mean() for t in (0, 2, 3))
    assert relative_error_sum(came, expected, labels).item() == pytest.approx(relative.item(), rel=1e-9)
    assert mean_square_sum(came, expected, labels).item() == pytest.approx(square.item(), rel=1e-9)
    # A token whose output is zero can't be divided by.
    assert relative_error_sum(came * 0, expected * 0, labels).item() == 0


def test_gradients_found_at_once_are_those_of_the_backward_pass():
    torch.manual_seed(0)
    layer, unused = torch.nn.Linear(3, 2).double(), torch.nn.Parameter(torch.ones(2))
    x = draw(5, 3)
    weights = [*layer.parameters(), unused]

    def loss():
        return layer(x).square().sum()

    (4 * loss()).backward()
    wanted = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    (4 * with_gradients(loss(), weights)).backward()
    for parameter, gradient in zip(layer.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert unused.grad.tolist() == [0, 0]
    with torch.no_grad():
        assert not with_gradients(loss(), weights).requires_grad
