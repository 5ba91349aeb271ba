"""Losses towards a teacher are those of their definitions; LoRA on fused matrices changes nothing, merged little."""

import pytest
import torch
import torch.nn.functional as F

from seqtrain.convert.losses import distillation_sum, mean_square_sum, relative_error_sum, with_gradients
from seqtrain.convert.weights import recipe_targets
from seqtrain.models.lora import add_adapters, merge_adapters
from seqtrain.testing import relative_error
from tests.convert.convert_cases import read_teacher, some_tokens

ALL = ("q", "k", "v", "out", "gate", "up", "down")


@pytest.fixture
def model(transformers_on_disk):
    return read_teacher(transformers_on_disk("qwen2")[1]).requires_grad_(False)


def adapted(model, size):
    """`model` with adapters on every matrix, whose products are of about `size`."""
    add_adapters(model, recipe_targets(model, ALL), rank=2, alpha=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.fill_(1.0)
            elif "lora_B" in name:
                parameter.copy_(size / 2 * torch.randn(len(parameter), 1).sign().expand_as(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model(some_tokens(2, 20), all_logits=True)[0]


def test_new_adapters_change_nothing_and_are_all_that_is_trained(model):
    before, names = logits(model), {name for name, _ in model.named_parameters()}
    add_adapters(model, recipe_targets(model, ("q", "v", "down")), rank=3, alpha=6)
    assert relative_error(logits(model), before) < 1e-6
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 3 * len(model.blocks)
    assert {parameter.shape[0] for name, parameter in trained.items() if "lora_A" in name} == {3}
    assert {parameter.shape[1] for name, parameter in trained.items() if "lora_B" in name} == {3}
    merge_adapters(model)
    assert {name for name, _ in model.named_parameters()} == names


def test_merged_weights_compute_what_the_adapters_did(model):
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    before = logits(model)
    expected = logits(adapted(model, 0.05))
    assert relative_error(expected, before) > 0.1
    merge_adapters(model)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    assert relative_error(logits(model), expected) < 1e-5


def test_small_updates_survive_merging(model):
    """In bfloat16 much of an update of 5e-4 is lost in the sum; in float32 nothing is."""
    name = "blocks.1.mixer.out.weight"
    base = dict(model.named_parameters())[name].clone()
    adapted(model, 5e-4)
    wanted = model.get_submodule("blocks.1.mixer.out").merged() - base
    assert wanted.abs().mean().item() == pytest.approx(5e-4, rel=0.01)
    in_half = (base.bfloat16() + wanted.bfloat16()).float() - base.bfloat16().float()
    assert relative_error(in_half, wanted) > 0.2
    # Weights that are bfloat16 themselves are merged in float32 all the same.
    model.to(torch.bfloat16)
    merge_adapters(model)
    came = dict(model.named_parameters())[name]
    assert came.dtype == torch.float32
    update = came - base.bfloat16().float()
    assert relative_error(update, wanted) < 1e-2


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
