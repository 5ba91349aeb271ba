"""TTT-Linear: the dual form against the loop over tokens, the loop against gradients that autograd takes."""

import pytest
import torch

from seqtrain.kernels import ttt_linear
from seqtrain.kernels.ttt_linear.inner import InnerModel
from seqtrain.testing import assert_within, compare_with_oracle, relative_error

H, K, C = 2, 4, 5


def inputs(tokens, *, batch=1, past=0, states=None, seed=0):
    """Arguments by name; the state is what `past` earlier tokens left, in the midst of a mini-batch."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        **{name: normal(batch, tokens, H, K) for name in ("q", "k", "v")},
        "rate": torch.rand(batch, tokens, H, generator=generator, dtype=torch.float64),
        "start": normal(H, K + 1, K),
        "norm_weight": 1 + 0.3 * normal(H, K),
        "norm_bias": 0.3 * normal(H, K),
        "shares": torch.rand(C, generator=generator, dtype=torch.float64),
    }
    if past:
        rows = batch if states is None else states
        before = inputs(past, batch=rows, seed=seed + 1)
        learned = {name: tensors[name] for name in ("start", "norm_weight", "norm_bias", "shares")}
        _, tensors["initial_state"] = ttt_linear(**before | learned, backend="reference")
    return tensors


@pytest.mark.parametrize("past", [0, 3, 10])
@pytest.mark.parametrize("tokens", [2, 5, 17])
def test_the_dual_form_equals_the_loop(tokens, past):
    tensors = inputs(tokens, batch=2, past=past)
    assert_within(compare_with_oracle(ttt_linear, tensors, dtype=torch.float64), torch.float64)
    assert_within(compare_with_oracle(ttt_linear, tensors), torch.float32)


def test_rows_in_the_midst_of_mini_batches_at_different_tokens():
    tensors = inputs(12, batch=2)
    states = [inputs(12, past=past) for past in (3, 4)]
    tensors["initial_state"] = torch.cat([state["initial_state"] for state in states])
    assert_within(compare_with_oracle(ttt_linear, tensors, dtype=torch.float64), torch.float64)


@torch.enable_grad()
def test_the_loop_descends_the_gradient_of_the_error():
    tensors = inputs(13)
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


def test_gradient_of_the_inner_error():
    generator = torch.Generator().manual_seed(2)
    z, target, weight, bias = torch.randn(4, 3, K, generator=generator, dtype=torch.float64)
    z.requires_grad_()
    model = InnerModel(z, weight, bias, z)
    (expected,) = torch.autograd.grad((model.norm(z) - target).square().sum() / 2, z)
    assert relative_error(model.error_gradient(z, target), expected) < 1e-12
