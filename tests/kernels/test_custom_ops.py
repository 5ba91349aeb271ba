"""Operators as torch.compile sees them: the same results and gradients as called plainly, and shapes told truly."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import differentiable, opaque

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def _scaled(x: Tensor, other: Tensor | None, count: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    out = factor * x if other is None else factor * x * other
    return out, x.sum(0) + count.sum(), x.exp()


def _scaled_gradients(arguments, kept, gradients):
    x, other, _, factor = arguments
    (exponential,), (d_out, d_sum) = kept, gradients
    assert torch.equal(exponential, x.exp())
    d_x = factor * d_out * (1 if other is None else other) + d_sum
    return d_x, None if other is None else factor * d_out * x, None, None


def _scaled_shapes(x, other, count, factor):
    return torch.empty_like(x), x.new_empty(x.shape[1:]), torch.empty_like(x)


scaled = differentiable("test_scaled", forward=_scaled, backward=_scaled_gradients, shapes=_scaled_shapes, results=2)


@opaque("test_untraceable", like=lambda x, _, cu_seqlens: (x, x))
def untraceable(x: Tensor, text: str, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """What a graph can't hold: numbers read on the host, a Python loop over them. One result is an argument itself."""
    assert text == "text"
    parts = [part * n for n, part in enumerate(x.split(cu_seqlens.diff().tolist()))]
    return torch.cat(parts), x


@opaque("test_alone", like=lambda x: (x,))
def alone(x: Tensor) -> tuple[Tensor]:
    return (x.sin() if x.sum().item() else x,)


def leaf(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(function, *leaves):
    results = function(*leaves)
    return [x.detach() for x in results], torch.autograd.grad(sum((x * x).sum() for x in results), leaves)


def assert_compiles(function, *leaves):
    expected = gradients(function, *leaves)
    came = gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), *leaves)
    for some, right in zip(came, expected, strict=True):
        assert all(torch.allclose(x, y, rtol=1e-12) for x, y in zip(some, right, strict=True))


def test_both_forms_of_an_operator_follow_its_formula():
    x, other, count = leaf(3, 4), leaf(3, 4, seed=1), torch.tensor([2, 3])
    out, total = scaled(x, other, count, 2.0)
    assert torch.equal(out, 2 * x * other)
    assert torch.equal(total, x.sum(0) + 5)
    torch.autograd.gradcheck(lambda *leaves: scaled(*leaves, count, 2.0), (x, other))
    assert_compiles(lambda x, other: scaled(x, other, count, 2.0), x, other)
    assert_compiles(lambda x: scaled(x, None, count, 2.0), x)
    torch.library.opcheck(scaled.op, (x, other, count, 2.0), test_utils=CHECKS)


def test_a_result_that_is_not_used_has_a_gradient_of_zero():
    x = leaf(3, 4)
    for n, expected in enumerate((torch.full_like(x, 2.0), torch.ones_like(x))):
        found = torch.autograd.grad(scaled(x, None, torch.tensor([0]), 2.0)[n].sum(), x)[0]
        assert torch.equal(found, expected)


def test_what_can_t_be_traced_compiles():
    x, boundaries = leaf(9, 2), torch.tensor([0, 4, 4, 9])
    assert_compiles(lambda x: untraceable(x, "text", boundaries), x)
    assert_compiles(lambda x: alone(x), x)
    torch.library.opcheck(untraceable.operator.op, (x, "text", boundaries), test_utils=CHECKS)


def test_outside_of_graphs_the_function_itself_runs():
    x = leaf(9, 2)
    assert untraceable(x, "text", torch.tensor([0, 9]))[1] is x


# What each opaque form is given for one row of 30 tokens in two documents; letters stand for shapes.
SIZES = {"B": 1, "T": 30, "H": 2, "K": 4, "V": 3, "D": 5, "G": 3, "N": 2, "S": 2, "F": 15, "W": 3}
FORMS = {
    "linear_attention": ("BTHK", "BTHK", "BTHV", "-BTHK", "SHKV", 0.5, "boundaries"),
    "delta_rule": ("BTHK", "BTHK", "BTHV", "BTH", "-BTH", "SHKV", 0.5, "boundaries", "BTHK", "BTHK"),
    "diagonal_scan": ("BTD", "-BTD", "SD", "boundaries"),
    "diagonal_system": ("BTG", "cGN", "cGN", "cGN", "scan", "cSX", "boundaries"),
    "short_convolution": ("BTD", "DW", None, "silu", 1, "SSD", "boundaries"),
    "slot_scores": ("BTHK", "BTHK", "BTHV", "-BTHV", "SHVK", 0.5, "boundaries"),
    "tensor_attention": ("BTHK",) * 3 + ("BTHV",) * 2 + (2, 0.5, "zSHSFK", "boundaries"),
    "ttt_linear": ("BTHK",) * 3 + ("BTH", "HLK", "HbK", "HbK", "D", "zSHMK", "boundaries"),
}
SIZES |= {"X": 6, "L": 5, "M": 11, "b": 1}


def argument(given, seed):
    if not isinstance(given, str) or given in ("scan", "silu"):
        return given
    if given == "boundaries":
        return torch.tensor([0, 11, 30])
    kind, shape = (given[0], given[1:]) if given[0] in "-cz" else ("", given)
    x = torch.randn([SIZES[letter] for letter in shape], generator=torch.Generator().manual_seed(seed))
    x = {"-": -x.abs(), "c": torch.complex(-x.abs(), x), "z": 0 * x}.get(kind, x)
    return x.requires_grad_()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("name", FORMS)
def test_every_opaque_form_tells_its_shapes_and_has_its_gradients(name, backend):
    form = import_module(f"seqtrain.kernels.{name}.{backend}").run
    arguments = [argument(each, seed) for seed, each in enumerate(FORMS[name])]
    torch.library.opcheck(form.operator.op, tuple(arguments), test_utils=CHECKS)
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    weights = [torch.randn_like(x) for x in form(*arguments)]

    def found(function):
        return torch.autograd.grad(function(*arguments), leaves, weights)

    for came, right in zip(found(form.operator.op), found(form), strict=True):
        assert torch.allclose(came, right, rtol=1e-5, atol=1e-6)
