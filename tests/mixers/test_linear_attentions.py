"""The linear attentions that correct what a sum of weights loses, against their papers' formulas, token by token."""

import pytest
import torch
import torch.nn.functional as F

from seqtrain.mixers.dydila import choice
from seqtrain.mixers.mala import magnitude_aware_weights
from seqtrain.testing import relative_error
from tests.mixers.definition_cases import TOKENS, build, heads, merged, rms, rotated, x

pytestmark = pytest.mark.usefixtures("no_gradients")


def elu(features):
    return F.elu(features) + 1


@pytest.mark.parametrize(("feature_map", "phi"), [("elu", elu), ("relu", torch.relu)])
def test_norm_attention(feature_map, phi):
    mixer = build("trans_normer", index=2, feature_map=feature_map)
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    weights = (rotated(phi(q)) @ rotated(phi(k)).mT / 8**0.5).tril()
    out = rms(weights @ v, mixer.norm.norm.weight)
    assert relative_error(mixer(x())[0], mixer.out(merged(out))) < 1e-12


def test_diag_attention_is_softmax_within_blocks():
    mixer = build("trans_normer", index=1, block=7)
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    block = torch.arange(TOKENS) // 7
    seen = (block[:, None] == block).tril()
    weights = (rotated(q) @ rotated(k).mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    assert relative_error(mixer(x())[0], mixer.out(merged(weights @ v))) < 1e-12


def test_lower_layers_are_diag_attention_as_the_share_says():
    for share, expected in ((0.5, [True, True, False, False]), (0.0, 4 * [False]), (1.0, 4 * [True])):
        assert [build("trans_normer", index=index, diag_share=share).diagonal for index in range(4)] == expected


def test_mala():
    mixer = build("mala", conv_width=0)
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    rows = []
    for t in range(TOKENS):
        score = elu(q[:, :, t, None]) @ elu(k[:, :, : t + 1]).mT / 8**0.5  # B H 1 t+1
        mean = score.mean(-1, keepdim=True)
        weights = (score * (1 + 1 / mean) - mean) / (t + 1)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 1, dtype=torch.float64))
        rows.append(weights @ v[:, :, : t + 1])
    out = merged(torch.cat(rows, 2)) * mixer.gate(x())
    assert relative_error(mixer(x())[0], mixer.out(out)) < 1e-12
    weights = magnitude_aware_weights(q.transpose(1, 2), k.transpose(1, 2))
    assert relative_error(merged(weights @ v) * mixer.gate(x()), out) < 1e-12


def test_long_queries_spread_the_weights_of_mala_and_not_those_of_a_sum():
    q, k = torch.randn(2, 1, 40, 1, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q = q.abs()  # so that elu + 1 keeps the direction, but for the 1
    short, long = (magnitude_aware_weights(q * size, k)[0, 0, -1] for size in (10.0, 1000.0))
    assert long.std() > 50 * short.std()
    score = [(elu(q * size)[:, -1] * elu(k)).sum(-1).flatten() for size in (10.0, 1000.0)]
    plain = [row / row.sum() for row in score]
    assert relative_error(plain[1], plain[0]) < 0.1


def test_nalaformer():
    mixer = build("nalaformer", conv_width=0)
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    q, k = 3 * q, 3 * k
    mixer.qkv.linear.weight[:32] *= 3
    length = q.norm(dim=-1, keepdim=True)
    power = 3 * (0.5 + torch.tanh(length))
    # The cosine between signs: 1 where a channel of the query and of the key agree, 0 where they are opposed.
    magnitude = (q / length).abs() ** power, k.abs() ** 3
    agree = (q[..., :, None, :].sign() == k[..., None, :, :].sign()).double()
    weights = torch.einsum("bhtr,bhjr,bhtjr->bhtj", *magnitude, agree).tril()
    out = rms(weights @ v / weights.sum(-1, keepdim=True), mixer.norm.norm.weight)
    out = merged(out) * F.silu(mixer.gate(x()))
    # Lengths have 1e-6 added to their squares.
    assert relative_error(mixer(x())[0], mixer.out(out)) < 1e-5


@pytest.mark.parametrize("power", [2.0, 3.0])
@torch.enable_grad()
def test_gradients_of_nalaformer_are_finite_at_zero(power):
    mixer = build("nalaformer", power=power)
    inputs = torch.zeros(1, 5, 16, dtype=torch.float64, requires_grad=True)
    mixer(inputs)[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())
    assert inputs.grad.isfinite().all()


@pytest.mark.parametrize("window", [0, 5])
def test_based(window):
    mixer = build("based", window=window, conv_width=0, expand_key=0.5)
    q, k, v = heads(mixer.qkv.linear(x()), 4, 4, 8)
    score = q @ k.mT / 2
    taylor = (1 + score + score**2 / 2).tril()
    out = taylor @ v / taylor.sum(-1, keepdim=True)
    if window:
        mixer.share.copy_(torch.tensor([-1.0, 2.0]))
        share = torch.sigmoid(mixer.share)[:, None, None]
        place = torch.arange(TOKENS)
        seen = (place[:, None] >= place) & (place[:, None] - place < window)
        near = score.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        out = share * near + (1 - share) * out
    assert relative_error(mixer(x())[0], mixer.out(merged(out))) < 1e-12


def test_dydila():
    mixer = build("dydila", conv_width=0, projections=2, factors=3)
    generator = torch.Generator().manual_seed(2)
    mixer.powers.copy_(4 * torch.rand(12, generator=generator, dtype=torch.float64) - 1)
    mixer.shares.copy_(torch.rand(6, generator=generator, dtype=torch.float64))
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    scores = mixer.router(x()).split([2, 2, 3, 3, 3, 3, 3, 3], 2)
    chosen = [score.argmax(-1) for score in scores]
    assert all(len(which.unique()) > 1 for which in chosen)  # else nothing was chosen

    def projected(which, weights):
        candidates = torch.stack([heads(x() @ weight.T, 8)[0] for weight in weights.chunk(2)])  # n B H T K
        return torch.where(which[:, None, :, None] == 0, candidates[0], candidates[1])

    def sharpened(z, which, powers):
        z = z.relu()
        raised = z ** powers.clamp(min=0).add(1)[which][:, None, :, None]
        return raised / raised.norm(dim=-1, keepdim=True).clamp(min=1e-12) * z.norm(dim=-1, keepdim=True)

    other_q, other_k = map(projected, chosen[:2], mixer.redundant.weight.chunk(2))
    sharp = [sharpened(*z) for z in zip((q, other_q, k, other_k), chosen[2:6], mixer.powers.chunk(4), strict=True)]
    share_q, share_k = (
        part[which][:, None, :, None] for part, which in zip(mixer.shares.chunk(2), chosen[6:], strict=True)
    )
    weights = ((sharp[0] - share_q * sharp[1]) @ (sharp[2] - share_k * sharp[3]).mT / 8**0.5).tril()
    out = rms(weights @ v, mixer.norm.norm.weight)
    # Lengths have 1e-12 added to their squares.
    assert relative_error(mixer(x())[0], mixer.out(merged(out))) < 1e-6


@torch.enable_grad()
def test_a_choice_is_hard_and_its_gradient_that_of_a_softmax():
    scores = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    worth = torch.arange(5, dtype=torch.float64)
    chosen = choice(scores)
    assert torch.equal(chosen.detach(), F.one_hot(scores.argmax(-1), 5).double())
    (came,) = torch.autograd.grad((chosen * worth).sum(), scores)
    (expected,) = torch.autograd.grad((scores.softmax(-1) * worth).sum(), scores)
    assert relative_error(came, expected) < 1e-12
