"""What is particular to norm and gate, delays, short convolutions, windows with sinks, and TTT-Linear."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from seqtrain.kernels import delay, gated_norm, short_convolution, sink_attention, softmax_attention, ttt_linear
from seqtrain.testing import relative_error
from tests.kernels.contract_cases import CASES, Case, assert_equal, call, check, run


def test_zeros_have_a_gradient():
    x = torch.zeros(1, 2, 1, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(gated_norm(x, torch.ones(8), eps=1e-6).sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("by", [0, 1, 5, 40])
def test_a_delay_is_indexing(by):
    x = torch.randn(2, 17, 3, 2, dtype=torch.float64)
    whole, state = delay(x, by=by)
    later = torch.cat([x.new_zeros(2, by, 3, 2), x], 1)
    assert torch.equal(whole, later[:, :17])
    assert torch.equal(state, later[:, 17:])


@pytest.mark.parametrize("lengths", [None, [0, 1, 21, 0, 39, 2, 0]], ids=["rows", "documents"])
def test_a_convolution_of_many_blocks(monkeypatch, lengths):
    monkeypatch.setattr(import_module("seqtrain.kernels.short_convolution.chunked"), "BLOCK", 5 * 6)
    for dilation in (1, 4, 16):
        case = Case(short_convolution, {"activation": "silu", "dilation": dilation})
        check(case, "chunked", 63, torch.float32, lengths=lengths, past=True)


@pytest.mark.parametrize("dilation", [1, 5])
def test_it_is_the_causal_convolution(dilation):
    x, weight, bias = Case(short_convolution).tensors(20).values()
    padded = F.pad(x.transpose(1, 2), (3 * dilation, 0))
    expected = F.conv1d(padded, weight[:, None], bias, groups=len(weight), dilation=dilation).transpose(1, 2)
    assert relative_error(short_convolution(x, weight, bias, dilation=dilation)[0], expected) < 1e-14


SINKS = Case(sink_attention, {"window": 4, "sinks": 3})
PLAIN = Case(sink_attention, shapes={"extra_score": None, "extra_value": None})


@pytest.mark.parametrize("before", [0, 2, 50])
def test_tokens_may_have_no_extra_entry(before):
    state = call(SINKS, SINKS.tensors(before, seed=9), backend="reference")[1] if before else None
    for tokens in (1, 37):
        tensors = SINKS.tensors(tokens)
        tensors["extra_score"][:, ::3] = -torch.inf
        expected = run(SINKS, tensors, state, backend="reference")
        assert_equal(run(SINKS, tensors, state, backend="chunked"), expected, 1e-12)


def test_without_sinks_it_is_a_sliding_window_and_over_everything_it_counts_them_once():
    tensors = PLAIN.tensors(30)
    q, k, v = (tensors[name] for name in "qkv")
    assert relative_error(sink_attention(q, k, v, window=8)[0], softmax_attention(q, k, v, window=8)[0]) < 1e-12
    assert relative_error(sink_attention(q, k, v, window=30, sinks=4)[0], softmax_attention(q, k, v)[0]) < 1e-12


def test_large_scores_keep_both_terms_under_one_maximum():
    """With a maximum taken from one term only, the other one overflows or vanishes."""
    tensors = SINKS.tensors(20)
    tensors["extra_score"] = tensors["extra_score"] + 500
    tensors["q"] = tensors["q"] * 300
    out, _ = call(SINKS, {key: x.float() for key, x in tensors.items()})
    assert relative_error(out, call(SINKS, tensors, backend="reference")[0]) < 1e-4


def test_a_state_of_other_sinks_and_window_is_refused():
    _, state = call(SINKS, SINKS.tensors(4))
    with pytest.raises(ValueError, match=r"k of: initial_state has shape \(2, 3, 2, 8\), expected \(2, 4"):
        sink_attention(**SINKS.tensors(4), window=5, sinks=3, initial_state=state)


H, K, C = 2, 4, 5


@torch.enable_grad()
def test_the_loop_descends_the_gradient_of_the_error():
    tensors = Case(ttt_linear, sizes={"H": H, "K": K, "C": C}).tensors(13, batch=1)
    memory, total, rows = tensors["start"], 0, []
    weight, bias = (tensors[name].view(H, 1, K) for name in ("norm_weight", "norm_bias"))

    def answer(x, memory):
        z = (torch.cat([x, torch.ones(H, 1, 1, dtype=x.dtype)], -1) @ memory)[:, 0]
        return x + torch.nn.functional.layer_norm(z, (K,), eps=1e-6)[:, None] * weight + bias

    for t in range(13):
        q, k, v = (tensors[name][0, t, :, None] for name in ("q", "k", "v"))
        leaf = memory.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((answer(k, leaf) - v).square().sum() / 2, leaf)
        total = total + tensors["rate"][0, t, :, None, None] * gradient
        now = memory - tensors["shares"][t % C] * total
        rows.append(answer(q, now)[:, 0])
        if t % C == C - 1:
            memory, total = now, 0
    for backend in ("reference", "chunked"):
        out, state = ttt_linear(**tensors, backend=backend)
        assert relative_error(out[0], torch.stack(rows)) < 1e-12
        assert relative_error(state[0, :, : K + 1], memory - tensors["start"]) < 1e-11
        assert relative_error(state[0, :, K + 1 : -1], total) < 1e-11
        assert (state[0, :, -1] == 13 % C).all()


def test_rows_in_the_midst_of_mini_batches_at_different_tokens():
    case = CASES["ttt_linear"]
    tensors, state = case.tensors(12), case.state(2, packed=True)
    came, expected = (run(case, tensors, state, backend=backend) for backend in ("chunked", "reference"))
    assert_equal(came, expected, 1e-11)
