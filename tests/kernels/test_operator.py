"""The declaration of an operator: what is cut in time, shapes and FLOPs; it behaves as the function it decorates."""

import copy
import inspect
import pickle

import pytest
import torch

from seqtrain.kernels import OPERATORS, linear_attention, operator, softmax_attention


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
