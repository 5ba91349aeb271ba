"""Triton kernels as a GPU runs them, against the float64 definition: widths, dtypes, decays, documents, long rows.

The interpreter's tests hold the algebra to tighter limits; here compiled code meets the project's own.
"""

import pytest
import torch
from torch import Tensor

from seqtrain.kernels import (
    delta_rule,
    diagonal_scan,
    linear_attention,
    linear_cross_entropy,
    short_convolution,
    softmax_attention,
    tensor_attention,
)
from seqtrain.kernels.segments import by_segment
from seqtrain.testing import (
    assert_within,
    boundaries,
    compare_with_oracle,
    recurrence_inputs,
    relative_error,
    run_with_gradients,
)
from tests.kernels import test_diagonal as scans
from tests.kernels import test_gated_norm as norms
from tests.kernels import test_linear_cross_entropy as losses
from tests.kernels import test_short_convolution as convolutions

MATRIX = {"linear_attention": linear_attention, "delta_rule": delta_rule}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_operator = pytest.mark.parametrize("name", MATRIX)


def on_gpu(tensors):
    return {name: x.cuda() if isinstance(x, Tensor) else x for name, x in tensors.items()}


def matrix_inputs(name, tokens, *, beta=2.0, **options):
    return on_gpu(recurrence_inputs(tokens, beta=beta if name == "delta_rule" else None, **options))


def check(operator, tensors, dtype, **options):
    assert_within(compare_with_oracle(operator, tensors, backend="triton", dtype=dtype, **options), dtype)


@pytest.mark.parametrize("widths", [(16, 16), (64, 64), (128, 128), (256, 256), (80, 40)], ids=str)
@every_dtype
@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
@every_operator
def test_widths_and_dtypes(name, decay_shape, dtype, widths):
    lengths = (70, 0, 1, 90)
    sizes = {"key_width": widths[0], "value_width": widths[1], "states": len(lengths)}
    tensors = matrix_inputs(name, sum(lengths), decay_shape=decay_shape, decay="wide", beta=1.0, **sizes)
    check(MATRIX[name], tensors, dtype, cu_seqlens=boundaries(lengths))


@pytest.mark.parametrize("decay", ["mild", "strong", "spikes", "zero"])
@pytest.mark.parametrize("decay_shape", ["BTH", "BTHK"])
@every_operator
def test_decays(name, decay_shape, decay):
    tensors = matrix_inputs(name, 150, batch=2, key_width=64, value_width=64, decay_shape=decay_shape, decay=decay)
    check(MATRIX[name], tensors, torch.float32)


@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
def test_constant_beta_and_keys_that_are_alike(decay_shape, beta):
    tensors = matrix_inputs("delta_rule", 130, key_width=64, value_width=64, decay_shape=decay_shape, correlation=3.0)
    tensors["beta"] = torch.full_like(tensors["beta"], beta)
    check(delta_rule, tensors, torch.float32)


@every_dtype
@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
@every_operator
def test_one_token(name, decay_shape, dtype):
    tensors = matrix_inputs(name, 1, batch=3, key_width=64, value_width=40, decay_shape=decay_shape)
    check(MATRIX[name], tensors, dtype)


# As many programs as a GPU runs at one time and more, over many chunks: what small inputs can't show.
@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
@every_operator
def test_long_rows_and_many_programs(name, decay_shape):
    sizes = {"batch": 2, "heads": 12, "key_width": 128, "value_width": 128}
    tensors = matrix_inputs(name, 4000, decay_shape=decay_shape, beta=1.0, **sizes)
    rounded = {key: x if x is None else x.bfloat16().float() for key, x in tensors.items()}
    expected = run_with_gradients(MATRIX[name], {k: x if x is None else x.double() for k, x in rounded.items()})
    narrow = {key: x if x is None or key == "initial_state" else x.bfloat16() for key, x in rounded.items()}
    came, again = (run_with_gradients(MATRIX[name], narrow, backend="triton") for _ in range(2))
    assert_within({key: relative_error(came[key], expected[key]) for key in expected}, torch.bfloat16)
    assert all(torch.equal(came[key], again[key]) for key in came), "two runs differ: a race"


@pytest.mark.parametrize("widths", [(16, 40), (128, 128), (256, 256)], ids=str)
@every_dtype
@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
@every_operator
def test_segments_of_a_sharded_sequence(name, decay_shape, dtype, widths):
    sizes = {"batch": 2, "key_width": widths[0], "value_width": widths[1]}
    tensors = matrix_inputs(name, 330, decay_shape=decay_shape, decay="wide", beta=1.0, **sizes)
    check(by_segment(MATRIX[name]), tensors, dtype)


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("decay", ["wide", "strong", "spikes"])
@pytest.mark.parametrize("tokens", [2, 130, 5000])
def test_diagonal_scan(tokens, decay, documents):
    tensors, cu_seqlens = scans.case(tokens, documents=documents, decay=decay)
    # Gradients through decays of -40 are no numbers of float16.
    for dtype in DTYPES if decay == "wide" else DTYPES[:2]:
        check(diagonal_scan, on_gpu(tensors), dtype, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("constant", [False, True], ids=["gates", "constant"])
@pytest.mark.parametrize(("x_complex", "a_complex"), [(True, True), (False, True), (True, False)])
def test_complex_diagonal_scan(x_complex, a_complex, constant):
    tensors, cu_seqlens = scans.case(300, documents=True, x_complex=x_complex, a_complex=a_complex, constant=constant)
    check(diagonal_scan, on_gpu(tensors), torch.float32, cu_seqlens=cu_seqlens)


@every_dtype
@pytest.mark.parametrize(("width", "dilation"), [(1, 1), (3, 16), (4, 1)])
def test_short_convolution(width, dilation, dtype):
    tensors, cu_seqlens = convolutions.case(400, width, documents=True, dilation=dilation)
    options = {"activation": "silu", "dilation": dilation, "cu_seqlens": cu_seqlens}
    check(short_convolution, on_gpu(tensors), dtype, **options)


@every_dtype
@pytest.mark.parametrize("gate", ["none", "silu", "sigmoid", "first"])
@pytest.mark.parametrize("width", [16, 100, 1024])
def test_gated_norm(width, gate, dtype):
    tensors, options = norms.case(width, own=False, gate=gate)
    assert_within(norms.errors_of("triton", on_gpu(tensors), options, dtype), dtype)


@every_dtype
def test_linear_cross_entropy(dtype):
    hidden, weight, labels = (x.detach().cuda() for x in losses.case(dtype))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, chunk=16, backend="triton")
    came = [loss, *torch.autograd.grad(loss, (hidden, weight))]
    expected = losses.expected(hidden, weight, labels)
    errors = {
        name: relative_error(x, y) for name, x, y in zip(("loss", "hidden", "weight"), came, expected, strict=True)
    }
    assert_within(errors, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "value", "degree"), [(4, 64, 2), (3, 20, 2), (2, 8, 4)])
def test_tensor_attention(width, value, degree, dtype):
    generator = torch.Generator().manual_seed(3)
    widths = dict.fromkeys(("q", "k1", "k2"), width) | dict.fromkeys(("v1", "v2"), value)
    tensors = {name: torch.randn(1, 90, 2, size, generator=generator).double() for name, size in widths.items()}
    check(tensor_attention, on_gpu(tensors), dtype, degree=degree, cu_seqlens=boundaries([0, 1, 30, 59]))


@every_dtype
@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("window", [None, 33])
def test_softmax_attention(window, documents, dtype):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 300, heads, 32, generator=generator).cuda().to(dtype) for heads in (4, 2, 2))
    cu_seqlens = boundaries([100, 0, 1, 199]) if documents else None

    def run(backend, *tensors):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out, _ = softmax_attention(*leaves, window=window, cu_seqlens=cu_seqlens, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).cuda().view_as(out).to(out))]

    expected = run("reference", *(x.double() for x in (q, k, v)))
    for backend in ("auto", "chunked"):
        came = run(backend, q, k, v)
        errors = {name: relative_error(x, y) for name, x, y in zip(("out", *"qkv"), came, expected, strict=True)}
        assert_within(errors, dtype)
