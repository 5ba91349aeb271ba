"""diagonal_scan: chunked form and gradients against the float64 loop, decays to -80, documents, complex numbers."""

import pytest
import torch

from seqtrain.kernels import diagonal_scan
from seqtrain.testing import assert_within, boundaries, compare_with_oracle, decay_like, relative_error

D = 5


def normal(*shape, of_complex=False, seed=0):
    generator = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.complex128 if of_complex else torch.float64)


def case(tokens, *, documents=False, x_complex=False, a_complex=False, constant=False, decay="wide"):
    lengths = [0, 1, tokens // 3, 0, tokens - tokens // 3 - 1, 0]
    batch = 1 if documents else 2
    log_a = decay_like((D,) if constant else (batch, tokens, D), decay, torch.Generator().manual_seed(1))
    if a_complex:
        log_a = torch.complex(log_a, normal(*log_a.shape, seed=5))
    tensors = {
        "x": normal(batch, tokens, D, of_complex=x_complex),
        "log_a": log_a,
        "initial_state": normal(len(lengths) if documents else batch, D, of_complex=x_complex or a_complex),
    }
    return tensors, boundaries(lengths) if documents else None


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("decay", ["wide", "strong", "spikes", "zero"])
@pytest.mark.parametrize("tokens", [2, 17, 63, 130, 2200])
def test_chunked_equals_the_loop(tokens, decay, documents):
    tensors, cu_seqlens = case(tokens, documents=documents, decay=decay)
    assert_within(compare_with_oracle(diagonal_scan, tensors, cu_seqlens=cu_seqlens), torch.float32)


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize(("x_complex", "a_complex"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("tokens", [17, 130])
def test_complex_numbers(tokens, x_complex, a_complex, documents):
    tensors, cu_seqlens = case(tokens, documents=documents, x_complex=x_complex, a_complex=a_complex)
    assert_within(compare_with_oracle(diagonal_scan, tensors, cu_seqlens=cu_seqlens), torch.float32)


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("a_complex", [False, True])
def test_one_decay_for_all_tokens(a_complex, documents):
    tensors, cu_seqlens = case(130, documents=documents, a_complex=a_complex, constant=True)
    assert_within(compare_with_oracle(diagonal_scan, tensors, cu_seqlens=cu_seqlens), torch.float32)


@pytest.mark.parametrize("decay", ["wide", "strong", "spikes"])
def test_bfloat16(decay):
    tensors, _ = case(130, decay=decay)
    assert_within(compare_with_oracle(diagonal_scan, tensors, dtype=torch.bfloat16), torch.bfloat16)


def test_float64_is_kept_and_exact():
    tensors, _ = case(130)
    assert_within(compare_with_oracle(diagonal_scan, tensors, dtype=torch.float64), torch.float64)


def test_gradcheck():
    tensors, cu_seqlens = case(70, documents=True, a_complex=True)
    inputs = [x[..., :2].clone().requires_grad_() for x in tensors.values()]

    def scan(x, log_a, state):
        return diagonal_scan(x, log_a, initial_state=state, cu_seqlens=cu_seqlens, backend="chunked")

    assert torch.autograd.gradcheck(scan, inputs, fast_mode=True)


@pytest.mark.parametrize("cut", [1, 40, 99])
def test_any_cut_in_time_equals_the_whole(cut):
    tensors, _ = case(100, a_complex=True)
    x, log_a = tensors["x"], tensors["log_a"]
    whole, final = diagonal_scan(x, log_a)
    first, state = diagonal_scan(x[:, :cut], log_a[:, :cut])
    second, state = diagonal_scan(x[:, cut:], log_a[:, cut:], initial_state=state)
    assert relative_error(torch.cat([first, second], 1), whole) < 1e-12
    assert relative_error(state, final) < 1e-12


def test_documents_do_not_see_each_other():
    tensors, cu_seqlens = case(90, documents=True)
    x, log_a = tensors["x"].float(), tensors["log_a"].float()
    out, _ = diagonal_scan(x, log_a, cu_seqlens=cu_seqlens)
    changed = x.clone()
    changed[:, : 1 + 30] += 100.0  # the first two documents that have tokens
    other, _ = diagonal_scan(changed, log_a, cu_seqlens=cu_seqlens)
    assert torch.equal(out[:, 31:], other[:, 31:])
    assert not torch.equal(out[:, :31], other[:, :31])


def test_dtypes_of_output_and_state():
    x = torch.randn(1, 9, D, dtype=torch.bfloat16)
    log_a = -torch.rand(1, 9, D)
    out, state = diagonal_scan(x, log_a)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    out, state = diagonal_scan(x, torch.complex(log_a, log_a))
    assert (out.dtype, state.dtype) == (torch.complex64, torch.complex64)
    out, state = diagonal_scan(x[:, :1], log_a[:, :1])
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_no_tokens_leave_the_state():
    state = torch.randn(2, D)
    out, final = diagonal_scan(torch.zeros(2, 0, D), torch.zeros(2, 0, D), initial_state=state)
    assert out.shape == (2, 0, D)
    assert torch.equal(final, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_a": torch.zeros(2, 8, D)}, r"log_a has shape \(2, 8, 5\), expected \[B, T, D\] with T=9"),
        ({"x": torch.zeros(2, 9, D, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"initial_state": torch.zeros(2, 4)}, r"initial_state has shape \(2, 4\), expected \(2, 5\)"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens needs B=1"),
        ({"backend": "chunky"}, "did you mean 'chunked'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(2, 9, D), "log_a": torch.zeros(2, 9, D)} | change
    with pytest.raises(ValueError, match=message):
        diagonal_scan(arguments.pop("x"), arguments.pop("log_a"), **arguments)
