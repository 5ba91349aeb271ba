"""Mixers that no library we have carries, against their papers' formulas written out on their own weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from seqtrain.errors import ConfigError
from seqtrain.testing import relative_error
from tests.mixers.definition_cases import HEADS, TOKENS, build, decayed, heads, merged, rms, rotated, unit, x


def causal(scores):
    return scores.tril()


@pytest.mark.parametrize(
    ("feature_map", "phi"),
    [("elu", lambda s, q, k: (F.elu(q) + 1) @ (F.elu(k) + 1).mT), ("taylor2", lambda s, q, k: 1 + s + s * s / 2)],
)
@torch.no_grad()
def test_linear_attention_with_a_sum(feature_map, phi):
    mixer = build("linear_attention", feature_map=feature_map)
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    weights = causal(phi(q @ k.mT / math.sqrt(8), q, k))
    out = weights @ v / weights.sum(-1, keepdim=True)
    assert relative_error(mixer(x())[0], mixer.out(merged(out))) < 1e-12


@torch.no_grad()
def test_linear_attention_with_a_norm():
    mixer = build("linear_attention", feature_map="relu", normalizer="rms")
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    out = rms(causal(q.relu() @ k.relu().mT) @ v / math.sqrt(8), mixer.norm.norm.weight)
    assert relative_error(mixer(x())[0], mixer.out(merged(out))) < 1e-12


def test_a_sum_needs_non_negative_weights():
    with pytest.raises(ConfigError, match=r"^mixer\.linear_attention\.normalizer=sum: needs non-negative weights"):
        build("linear_attention", feature_map="identity", normalizer="sum")


@torch.no_grad()
def test_retnet_in_its_parallel_form():
    mixer = build("retnet")
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 16)
    place = torch.arange(TOKENS, dtype=torch.float64)
    distance = place[:, None] - place
    gamma = torch.tensor([1 - 1 / 32, 1 - 1 / 64], dtype=torch.float64)[:, None, None]
    decay = torch.where(distance >= 0, gamma ** distance.clamp(min=0), 0.0)
    out = (rotated(q) @ rotated(k).mT * decay / math.sqrt(8)) @ v
    out = merged(rms(out, mixer.norm.norm.weight)) * F.silu(mixer.gate(x()))
    # The decay is made in float32: 1 - 2**-5 is exact there, its logarithm is not.
    assert relative_error(mixer(x())[0], mixer.out(out)) < 1e-6


@torch.no_grad()
def test_gla():
    mixer = build("gla")
    q, k, v = heads(mixer.qkv.linear(x()), 4, 4, 8)
    (decay,) = heads(torch.sigmoid(mixer.forget(x())) ** (1 / 16), 4)
    out = merged(rms(decayed(q, k, v, decay), mixer.norm.norm.weight)) * F.silu(mixer.gate(x()))
    assert relative_error(mixer(x())[0], mixer.out(out)) < 1e-12


@pytest.mark.parametrize("index", [0, 3])
@torch.no_grad()
def test_hgrn2(index):
    mixer = build("hgrn2", index=index)
    q, raw, v = heads(mixer.qfv.linear(x()), 8, 8, 8)
    forget = index / 4 + (1 - index / 4) * torch.sigmoid(raw)
    out = merged(decayed(F.silu(q), 1 - forget, v, forget))
    assert relative_error(mixer(x())[0], mixer.out(rms(out, mixer.norm.weight))) < 1e-12


@pytest.mark.parametrize(("negative", "largest"), [(False, 1), (True, 2)])
@torch.no_grad()
def test_delta_net(negative, largest):
    mixer = build("delta_net", conv_width=0, allow_negative_eigenvalues=negative)
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    q, k = unit(q), unit(k)
    beta = largest * torch.sigmoid(mixer.beta(x())).transpose(1, 2)
    state, out = torch.zeros(2, HEADS, 8, 8, dtype=torch.float64), []
    for t in range(TOKENS):
        key = k[:, :, t, None]
        state = state + beta[:, :, t, None, None] * key.mT @ (v[:, :, t, None] - key @ state)
        out.append((q[:, :, t, None] @ state)[:, :, 0] / math.sqrt(8))
    out = rms(torch.stack(out, 2), mixer.norm.norm.weight)
    assert relative_error(mixer(x())[0], mixer.out(merged(out))) < 1e-12


@torch.no_grad()
def test_tensor_attention_weighs_pairs_and_stays_bounded():
    mixer = build("tensor_attention", conv_width=0)
    mixer.temperature.copy_(torch.tensor([30.0, -1.0]))
    q, k1, k2, v1, v2 = heads(mixer.parts.linear(x()), 4, 4, 4, 8, 8)
    q, k1, k2 = unit(q), unit(k1), unit(k2)
    tau = 2 * torch.sigmoid(mixer.temperature)[:, None, None, None]
    exponent = tau * torch.einsum("bhtr,bhir,bhjr->bhtij", q, k1, k2)
    assert exponent.abs().max() <= 2
    seen = torch.ones(TOKENS, TOKENS).tril()
    weights = (1 + exponent + exponent**2 / 2) * seen[:, :, None] * seen[:, None]
    out = torch.einsum("bhtij,bhiv,bhjv->bhtv", weights, v1, v2) / weights.sum((-2, -1))[..., None]
    assert relative_error(mixer(x())[0], mixer.out(merged(rms(out, mixer.norm.norm.weight)))) < 1e-10


@torch.no_grad()
def test_sliding_attention_sees_its_window():
    mixer = build("sliding_attention", window=5)
    changed = x()
    changed[:, 10] += 1
    difference = (mixer(changed)[0] - mixer(x())[0]).abs().amax((0, 2))
    assert difference.nonzero()[:, 0].tolist() == [10, 11, 12, 13, 14]
