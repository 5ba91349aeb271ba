"""Training without a backward pass: the estimate is the gradient's, pieces are the whole, weights stay the same."""

import dataclasses

import pytest
import torch

from seqtrain.convert.settings import StageConfig
from seqtrain.convert.tasks import DistilledModel, ZerothOrderModel
from seqtrain.convert.zeroth_order import two_sided
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.testing import boundaries
from tests.convert.convert_cases import some_tokens
from tests.convert.test_student import make_pair

STAGE = StageConfig(kind="zeroth_order", kl=1.0, ce=0.5, hidden=0.1)


def test_the_estimate_is_the_gradient_on_average():
    """Of a quadratic, where a two-sided difference is exact along its direction."""
    torch.manual_seed(0)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(6, 6, dtype=torch.float64)
    kept, total = weight.detach().clone(), torch.zeros(6, dtype=torch.float64)
    expected = matrix.T @ matrix @ kept
    for seed in range(4000):
        loss = two_sided([lambda side: (matrix @ weight).square().sum() / 2], [weight], seed, 1e-3)
        loss.backward()
        total, weight.grad = total + weight.grad, None
    assert torch.equal(weight, kept)
    assert (total / 4000 - expected).norm() < 0.15 * expected.norm()
    assert loss.item() == pytest.approx((matrix @ kept).square().sum().item() / 2, rel=1e-3)


@pytest.fixture
def pair(transformers_on_disk):
    """With the gates alone under training."""
    teacher, student = make_pair(transformers_on_disk("qwen2")[1], "gla", window=8)
    student.requires_grad_(False)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("opening" in name)
    return teacher, student


@pytest.mark.parametrize("segment", [0, 7])
def test_a_row_in_pieces_has_the_loss_of_the_whole(pair, segment):
    """Documents end inside pieces and at their edges; the memory and the window go on from piece to piece."""
    teacher, student = pair
    tokens, starts = some_tokens(1, 33), boundaries([5, 9, 19])
    labels = tokens.roll(-1, 1)
    labels[0, [4, 13, 32]] = -100
    sequence = SequenceContext(starts)
    whole = DistilledModel(student, teacher, dataclasses.replace(STAGE, kind="train"))
    moving = [parameter for parameter in student.parameters() if parameter.requires_grad]
    expected = whole(tokens, labels, sequence=sequence)
    exact = torch.autograd.grad(expected, moving)
    before = [parameter.clone() for parameter in student.parameters()]
    streamed = ZerothOrderModel(student, teacher, dataclasses.replace(STAGE, segment=segment, epsilon=1e-3))
    loss = streamed(tokens, labels, sequence=sequence)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), before, strict=True))
    # With the slope s along z, the estimate is s z: times the gradient it is s^2, times itself s^2 |z|^2.
    along = sum((parameter.grad * each).sum() for parameter, each in zip(moving, exact, strict=True))
    size = sum(parameter.grad.square().sum() for parameter in moving)
    directions = sum(parameter.numel() for parameter in moving)
    assert along > 0
    assert (size / along).item() == pytest.approx(directions, rel=0.5)


def test_a_teacher_runs_once_for_both_sides(pair):
    teacher, student = pair
    calls = {"teacher": 0, "student": 0}
    for name, model in (("teacher", teacher), ("student", student)):
        model.blocks[0].register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    tokens = some_tokens(1, 20)
    ZerothOrderModel(student, teacher, dataclasses.replace(STAGE, segment=7))(tokens, tokens.roll(-1, 1))
    assert calls == {"teacher": 3, "student": 6}


def test_the_same_row_takes_the_same_direction(pair):
    teacher, student = pair
    moving = [parameter for parameter in student.parameters() if parameter.requires_grad]

    def gradient(seed):
        for parameter in moving:
            parameter.grad = None
        tokens = some_tokens(1, 20, seed=seed)
        ZerothOrderModel(student, teacher, STAGE)(tokens, tokens.roll(-1, 1)).backward()
        return torch.cat([parameter.grad.flatten() for parameter in moving])

    first, again, other = gradient(1), gradient(1), gradient(2)
    assert torch.equal(first, again)
    assert not torch.allclose(first / first.norm(), other / other.norm(), atol=0.1)
