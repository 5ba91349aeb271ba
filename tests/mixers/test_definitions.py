"""Mixers that no library we have carries, against their papers' formulas written out on their own weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from seqtrain.errors import ConfigError
from seqtrain.testing import relative_error
from tests.mixers.definition_cases import HEADS, TOKENS, WIDTH, build, decayed, heads, l2norm, merged, rms, rotated, x
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize(
    ("feature_map", "phi"),
    [("elu", lambda s, q, k: (F.elu(q) + 1) @ (F.elu(k) + 1).mT), ("taylor2", lambda s, q, k: 1 + s + s * s / 2)],
)
def test_linear_attention_with_a_sum(feature_map, phi):
    mixer = build("linear_attention", feature_map=feature_map)
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    weights = phi(q @ k.mT / math.sqrt(8), q, k).tril()
    out = weights @ v / weights.sum(-1, keepdim=True)
    assert relative_error(mixer(x())[0], mixer.out(merged(out))) < 1e-12


def test_linear_attention_with_a_norm():
    mixer = build("linear_attention", feature_map="relu", normalizer="rms")
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    out = rms((q.relu() @ k.relu().mT).tril() @ v / math.sqrt(8), mixer.norm.norm.weight)
    assert relative_error(mixer(x())[0], mixer.out(merged(out))) < 1e-12


def test_a_sum_needs_non_negative_weights():
    with pytest.raises(ConfigError, match=r"^mixer\.linear_attention\.normalizer=sum: needs non-negative weights"):
        build("linear_attention", feature_map="identity", normalizer="sum")


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


@pytest.mark.parametrize(("feature_map", "gated"), [("identity", True), ("relu", False), ("sigmoid", False)])
def test_gla(feature_map, gated):
    mixer = build("gla", feature_map=feature_map, output_gate=gated)
    q, k, v = heads(mixer.qkv.linear(x()), 4, 4, 8)
    if feature_map != "identity":
        q, k = (getattr(torch, feature_map)(part) for part in (q, k))
    (decay,) = heads(torch.sigmoid(mixer.forget(x())) ** (1 / 16), 4)
    out = merged(rms(decayed(q, k, v, decay), mixer.norm.norm.weight))
    out = out * F.silu(mixer.gate(x())) if gated else out
    assert relative_error(mixer(x())[0], mixer.out(out)) < 1e-12


@pytest.mark.parametrize("index", [0, 3])
def test_hgrn2(index):
    mixer = build("hgrn2", index=index)
    q, raw, v = heads(mixer.qfv.linear(x()), 8, 8, 8)
    forget = index / 4 + (1 - index / 4) * torch.sigmoid(raw)
    out = merged(decayed(F.silu(q), 1 - forget, v, forget))
    assert relative_error(mixer(x())[0], mixer.out(rms(out, mixer.norm.weight))) < 1e-12


@pytest.mark.parametrize(
    ("negative", "largest", "activation"), [(False, 1, "silu"), (True, 2, "silu"), (True, 2, "none")]
)
def test_delta_net(negative, largest, activation):
    mixer = build("delta_net", conv_width=0, allow_negative_eigenvalues=negative, activation=activation)
    through = {"silu": F.silu, "none": lambda projected: projected}[activation]
    q, k, v = heads(through(mixer.qkv.linear(x())), 8, 8, 8)
    q, k = l2norm(q), l2norm(k)
    beta = largest * torch.sigmoid(mixer.beta(x())).transpose(1, 2)
    state, out = torch.zeros(2, HEADS, 8, 8, dtype=torch.float64), []
    for t in range(TOKENS):
        key = k[:, :, t, None]
        state = state + beta[:, :, t, None, None] * key.mT @ (v[:, :, t, None] - key @ state)
        out.append((q[:, :, t, None] @ state)[:, :, 0] / math.sqrt(8))
    out = rms(torch.stack(out, 2), mixer.norm.norm.weight)
    assert relative_error(mixer(x())[0], mixer.out(merged(out))) < 1e-12


def test_tensor_attention_weighs_pairs_and_stays_bounded():
    mixer = build("tensor_attention", conv_width=0)
    mixer.temperature.copy_(torch.tensor([30.0, -1.0]))
    q, k1, k2, v1, v2 = heads(mixer.parts.linear(x()), 4, 4, 4, 8, 8)
    q, k1, k2 = l2norm(q), l2norm(k1), l2norm(k2)
    tau = 2 * torch.sigmoid(mixer.temperature)[:, None, None, None]
    exponent = tau * torch.einsum("bhtr,bhir,bhjr->bhtij", q, k1, k2)
    assert exponent.abs().max() <= 2
    seen = torch.ones(TOKENS, TOKENS).tril()
    weights = (1 + exponent + exponent**2 / 2) * seen[:, :, None] * seen[:, None]
    out = torch.einsum("bhtij,bhiv,bhjv->bhtv", weights, v1, v2) / weights.sum((-2, -1))[..., None]
    assert relative_error(mixer(x())[0], mixer.out(merged(rms(out, mixer.norm.norm.weight)))) < 1e-10


def test_sliding_attention_sees_its_window():
    mixer = build("sliding_attention", window=5)
    changed = x()
    changed[:, 10] += 1
    difference = (mixer(changed)[0] - mixer(x())[0]).abs().amax((0, 2))
    assert difference.nonzero()[:, 0].tolist() == [10, 11, 12, 13, 14]


def moved(name, **fields):
    """With vectors moved from where they start, so that none hides behind an initial 0 or 1."""
    mixer = build(name, index=1, **fields)
    for parameter in mixer.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.rand_like(parameter) * 0.5)
    return mixer


def attention(q, k, v, seen):
    scores = rotated(q) @ rotated(k).mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


QUERY, KEY = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)


@pytest.mark.parametrize("residual", ["gated", "plain"])
def test_tcnca(residual):
    mixer = moved("tcnca", chunk=7, conv_width=3, conv_depth=2, dilation=4, residual=residual)
    c = x()
    for layer, conv in enumerate(mixer.convs):
        reach = 4**layer
        padded = F.pad(c.transpose(1, 2), (2 * reach, 0))
        c = c + F.silu(F.conv1d(padded, conv.weight[:, None], groups=WIDTH, dilation=reach).transpose(1, 2))
    z, gate, candidate, update = mixer.parts(c).split([8, 32, WIDTH, WIDTH], 2)
    (scale_q, scale_k), (shift_q, shift_k) = mixer.scales.split(8), mixer.shifts.split(8)
    q, k = F.silu(z) * scale_q + shift_q, F.silu(z) * scale_k + shift_k
    seen = (KEY <= QUERY) & (KEY // 7 == QUERY // 7)
    (q,), (k,), (v,) = heads(q, 4), heads(k, 4), heads(F.silu(mixer.v(x())), 16)
    out = merged(attention(q, k, v, seen))
    expected, stream = update.sigmoid() * F.silu(candidate + mixer.out(F.silu(gate) * out)), 2 * x() + 1
    # MEGA's: what the gate takes in, the stream loses.
    expected = expected + stream * (1 - update.sigmoid() if residual == "gated" else 1)
    assert relative_error(stream + mixer(x(), stream=stream)[0], expected) < 1e-11
    steps, state = [], None
    for token, before in zip(x().unbind(1), stream.unbind(1), strict=True):
        step, state = mixer.step(token, state, stream=before)
        steps.append(before + step)
    assert relative_error(torch.stack(steps, 1), expected) < 1e-11


def test_a_block_shows_its_mixer_the_stream():
    layer = tiny.build(("tcnca",), depth=1).double().blocks[0]
    given = torch.randn(2, 20, layer.mixer.shape.width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mixed = given + layer.mixer(layer.mixer_norm(given), stream=given)[0]
    assert torch.equal(layer(given)[0], layer.feed(mixed))
    assert not torch.equal(layer(given)[0], layer.feed(given + layer.mixer(layer.mixer_norm(given))[0]))


def test_the_larger_spikingbrain_s_layer():
    mixer = moved("intra_hybrid", window=5, feature_map="sigmoid", tied_gate=True, learned_sinks=3)
    q, k, v = heads(mixer.qkv(x()), 8, 8, 8)
    far = decayed(torch.sigmoid(q), torch.sigmoid(k), v, 1 - torch.sigmoid(k))
    # Three more keys and values, the same for all tokens, under one softmax with the window's.
    sinks = [part.view(1, HEADS, 3, 8).expand(2, -1, -1, -1) for part in (mixer.sinks.keys, mixer.sinks.values)]
    turned, seen = [rotated(part) for part in (q, k)], (KEY <= QUERY) & (KEY > QUERY - 5)
    near = (turned[0] @ turned[1].mT).masked_fill(~seen, -torch.inf)
    scores = torch.cat([near, turned[0] @ sinks[0].mT], -1) / math.sqrt(8)
    branches = [far, scores.softmax(-1) @ torch.cat([v, sinks[1]], 2)]
    summed = sum(merged(rms(each, norm.norm.weight)) for each, norm in zip(branches, mixer.norms, strict=True))
    assert relative_error(mixer(x())[0], mixer.out(summed)) < 1e-11


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tied_gate": True}, r"intra_hybrid\.tied_gate=true: needs keys between 0 and 1"),
        ({"window": 0, "sinks": 2}, r"intra_hybrid\.window=0: sinks and learned_sinks are for a windowed branch"),
        ({"learned_sinks": 2, "score_cap": 3.0}, r"intra_hybrid\.score_cap=3.0: isn't there beside sinks"),
    ],
)
def test_an_intra_layer_hybrid_that_can_t_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        build("intra_hybrid", **fields)


@pytest.mark.parametrize("full", [False, True])
def test_the_intra_layer_hybrid(full):
    mixer = moved("intra_hybrid", window=5, full=full)
    q, k, v = heads(mixer.qkv(x()), 8, 8, 8)
    (decay,) = heads(torch.sigmoid(mixer.forget(x())) ** (1 / 16), 8)
    branches = [decayed(q, k, v, decay), attention(q, k, v, (KEY <= QUERY) & (KEY > QUERY - 5))]
    branches += [attention(q, k, v, KEY <= QUERY)] if full else []
    pairs = zip(branches, mixer.norms, strict=True)
    summed = sum(merged(rms(branch, norm.norm.weight)) for branch, norm in pairs)
    assert relative_error(mixer(x())[0], mixer.out(summed)) < 1e-11
    assert mixer.constant_state == (not full)
