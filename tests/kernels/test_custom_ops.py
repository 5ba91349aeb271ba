"""Operators: their declarations, and what torch.compile sees of them: the same results, and shapes told truly."""

import copy
import inspect
import pickle
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from seqtrain.kernels import OPERATORS, linear_attention, operator, softmax_attention
from seqtrain.kernels.custom_ops import differentiable, opaque
from tests.kernels.contract_cases import CASES, call

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


OPAQUE = ("linear_attention", "delta_rule", "delta_rule3", "diagonal_scan", "diagonal_system", "short_convolution")
OPAQUE += ("slot_scores", "tensor_attention", "ttt_linear")


def is_number(x):
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("name", OPAQUE)
def test_every_opaque_form_tells_its_shapes_and_has_its_gradients(name, backend, monkeypatch):
    """On what its operator gives it for one row of 30 tokens in two documents."""
    case, given = CASES[name], []
    package = f"seqtrain.kernels.{case.operator.name}"
    form = import_module(package).reference if backend == "reference" else import_module(f"{package}.{backend}").run
    called = lambda *arguments: given.append(arguments) or form(*arguments)  # noqa: E731
    monkeypatch.setattr(case.operator, "choose", lambda *_, **options: called)
    tensors, state = case.tensors(30, batch=1, dtype=torch.float32), case.state(2, dtype=torch.float32, packed=True)
    call(case, tensors, state, cu_seqlens=torch.tensor([0, 11, 30]), backend=backend)
    each, form_of = tree_flatten(given[0])
    arguments = [x.detach().requires_grad_() if is_number(x) else x for x in each]
    torch.library.opcheck(form.operator.op, tuple(arguments), test_utils=CHECKS)
    leaves = [x for x in arguments if is_number(x)]
    out = form(*tree_unflatten(arguments, form_of))
    weights = [torch.randn_like(x) for x in out]
    came, right = (torch.autograd.grad(x, leaves, weights) for x in (form.operator.op(*arguments), out))
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(came, right, strict=True))


@operator(
    arguments={"x": "B T D", "weight": "H K V", "decay": ("D", "B T D"), "rest": "B T ...", "bias": "D+1"},
    out="B T ...",
    flops=lambda *, B, T, D, complex, **_: B * T * D * (4 if complex else 1),
)
def example(x, weight, decay=None, rest=None, bias=None, *, power=1, cu_seqlens=None, backend="auto"):
    """What it does."""
    return x**power


@pytest.mark.parametrize("tokens", [15, 16])
def test_what_is_cut_in_time_is_declared_and_no_matter_of_sizes(tokens):
    x, weight = torch.zeros(2, 16, 16), torch.zeros(2, 16, 3)
    taken = example.take((x, weight, torch.zeros(16), torch.zeros(2, 16, 4, 5), None), slice(0, tokens))
    assert [None if part is None else tuple(part.shape) for part in taken] == [
        (2, tokens, 16), (2, 16, 3), (16,), (2, tokens, 4, 5), None
    ]  # fmt: skip
    assert example.along_time((x, weight, x)) == (True, False, True)


def test_tensors_by_name_take_their_places():
    x, decay = torch.zeros(1, 3, 2), torch.zeros(2)
    assert example.arranged((x,), {"decay": decay, "power": 2}) == ((x, None, decay, None, None), {"power": 2})


def test_it_is_the_function_it_decorates():
    assert example(torch.full((1,), 3.0), None, power=2) == 9
    assert (example.__name__, example.__doc__, example.__module__) == ("example", "What it does.", __name__)
    assert list(inspect.signature(example).parameters)[:2] == ["x", "weight"]
    assert pickle.loads(pickle.dumps(linear_attention)) is linear_attention
    assert copy.deepcopy(OPERATORS)["softmax_attention"] is softmax_attention


@pytest.mark.all
def test_two_backends_of_one_operator_are_one_graph():
    def both(x):
        out, _ = linear_attention(x, x, x, backend="chunked")
        return linear_attention(out, x, x, backend="reference")[0]

    x = torch.randn(1, 8, 2, 4)
    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, "example: weight is None, expected a tensor"),
        ({"weight": torch.zeros(2, 3)}, r"weight has shape \(2, 3\), expected \[H, K, V\]"),
        ({"decay": torch.zeros(2, 2)}, r"decay has shape \(2, 2\), expected \[D\] or \[B, T, D\]"),
        ({"decay": torch.zeros(1, 4, 2)}, r"decay has shape \(1, 4, 2\), expected \[B, T, D\] with T=3"),
        ({"bias": torch.zeros(2)}, r"bias has shape \(2,\), expected \[D\+1\] with D\+1=3"),
        ({"x": torch.zeros(1, 3, 2, dtype=torch.int64)}, "x has dtype torch.int64, expected a floating dtype"),
        ({"bias": torch.zeros(3, device="meta")}, "bias is on meta, expected cpu"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"x": torch.zeros(1, 3, 2), "weight": torch.zeros(2, 4, 5), "decay": None, "rest": None, "bias": None}
    with pytest.raises(ValueError, match=message):
        example.check(list((arguments | change).values()))


def test_flops_and_the_shape_of_the_output():
    x, weight, rest = torch.zeros(2, 3, 4), torch.zeros(1, 1, 1), torch.zeros(2, 3, 7, 5)
    assert example.flops((x, weight), {}) == 24
    assert example.out_shape((x, weight, None, rest), {}) == (2, 3, 7, 5)
    keys = [torch.zeros(2, 40, heads, 8) for heads in (6, 2, 2)]
    window = softmax_attention.state_shape(keys, {"window": 16}, 2)
    assert window == {
        "k": ((2, 15, 2, 8), torch.float32), "v": ((2, 15, 2, 8), torch.float32), "length": ((2,), torch.int64)
    }  # fmt: skip
    # 16 keys each, fewer for the first 15 queries.
    assert softmax_attention.flops(keys, {"window": 16}) == 2 * 2 * 6 * (8 + 8) * (16 * 40 - 15 * 16 // 2)
