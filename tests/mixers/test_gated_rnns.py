"""Gated RNNs and linear attentions against their papers' formulas, written out token by token."""

import pytest
import torch
import torch.nn.functional as F

from experiments.fidelity.entropy import magnitude_aware_weights
from seqtrain.mixers.dydila import choice
from seqtrain.testing import relative_error
from tests.mixers.definition_cases import HEADS, TOKENS, WIDTH, build, heads, l2norm, merged, rms, rotated, x

pytestmark = pytest.mark.usefixtures("no_gradients")

HEAD = WIDTH // HEADS


def columns(*parts):
    """`[B,T,D]` each -> `[B,H,T,K,1]`: column vectors, as these papers write them."""
    return [heads(part, HEAD)[0][..., None] for part in parts]


def group_norm(out, norm, eps):
    """`[B,H,T,V]` -> `[B,T,D]`."""
    flat = merged(out).flatten(0, 1)
    bias = 0 if norm.bias is None else norm.bias
    return (F.group_norm(flat, HEADS, eps=eps) * norm.weight + bias).unflatten(0, (2, TOKENS))


def before(x):
    return F.pad(x, (0, 0, 1, -1))


def randomize(mixer):
    """Initial values hide parameters behind ones and zeros."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
    return mixer


@pytest.mark.parametrize("index", [0, 2])
def test_rwkv7(index):
    m = randomize(build("rwkv7", index=index))
    xr, xw, xk, xv, xa, xg = (x() + (before(x()) - x()) * mix for mix in m.mixes.chunk(6))
    w = torch.exp(-torch.exp(torch.tensor(-0.5)).double() * torch.sigmoid(m.decay(xw)))
    a, k, v = torch.sigmoid(m.rate(xa)), m.k(xk), m.v(xv)
    r, w, a, k, v, scaled = columns(m.r(xr), w, a, k, v, k * m.removal_scale)
    kappa = scaled / scaled.square().sum(-2, keepdim=True).add(1e-6).sqrt()
    weight, bonus = (part.view(1, HEADS, 1, HEAD, 1) for part in (m.rate_weight, m.bonus))
    k = k * (1 + (a - 1) * weight)
    state, rows = torch.zeros(2, HEADS, HEAD, HEAD, dtype=torch.float64), []  # values x keys, as in the paper
    for t in range(TOKENS):
        transition = torch.diag_embed(w[:, :, t, :, 0]) - kappa[:, :, t] @ (a * kappa)[:, :, t].mT
        state = state @ transition + v[:, :, t] @ k[:, :, t].mT
        rows.append((state @ r[:, :, t])[..., 0])
    out = group_norm(torch.stack(rows, 2), m.norm, 1e-5 * HEAD)
    own = (r * bonus * k).sum(-2, keepdim=True) * v
    gate = torch.sigmoid(xg @ m.gate[0].weight.T) @ m.gate[2].weight.T
    # exp(-1/2) is rounded to float32 above.
    assert relative_error(m(x())[0], m.out((out + merged(own[..., 0])) * gate)) < 1e-6


@pytest.mark.parametrize("index", [0, 2])
def test_rwkv6(index):
    m = randomize(build("rwkv6", index=index))
    step = before(x()) - x()
    first = x() + step * m.first_mix
    mixed = [
        x() + step * (mix + torch.tanh(first @ low[0].weight.T) @ low[2].weight.T)
        for mix, low in zip(m.mixes.chunk(5), m.blend, strict=True)
    ]
    w = torch.exp(-torch.exp(m.decay(mixed[1])))
    r, w, k, v = columns(m.r(mixed[0]), w, m.k(mixed[2]), m.v(mixed[3]))
    u = m.bonus.view(1, HEADS, HEAD, 1)
    state, rows = torch.zeros(2, HEADS, HEAD, HEAD, dtype=torch.float64), []  # keys x values
    for t in range(TOKENS):
        written = k[:, :, t] @ v[:, :, t].mT
        rows.append((r[:, :, t].mT @ (state + u * written))[:, :, 0])
        state = w[:, :, t] * state + written
    out = group_norm(torch.stack(rows, 2), m.norm, 1e-5 * HEAD) * F.silu(m.gate(mixed[4]))
    assert relative_error(m(x())[0], m.out(out)) < 1e-12


def stabilized_mlstm(mixer, inputs):
    """xLSTM's definition, with the running maximum: `[B,T,D]` in float64."""
    q, k, v = heads(mixer.qkv.linear(inputs), 4, 4, 8)
    raw = 15 * torch.tanh(mixer.gates(inputs) / 15)
    gain, forget = (part.transpose(1, 2)[..., None, None] for part in (raw[..., :HEADS], raw[..., HEADS:]))
    forget = F.logsigmoid(forget)
    memory = torch.zeros(2, HEADS, 4, 8, dtype=torch.float64)
    normalizer, largest = torch.zeros(2, HEADS, 4, 1, dtype=torch.float64), torch.zeros(2, HEADS, 1, 1).double()
    rows = []
    for t in range(inputs.shape[1]):
        before, largest = largest, torch.maximum(forget[:, :, t] + largest, gain[:, :, t])
        keep, write = torch.exp(forget[:, :, t] + before - largest), torch.exp(gain[:, :, t] - largest)
        key = k[:, :, t, :, None] / 2
        memory = keep * memory + write * key * v[:, :, t, None]
        normalizer = keep * normalizer + write * key
        query = q[:, :, t, None]
        rows.append(query @ memory / torch.maximum((query @ normalizer).abs(), torch.exp(-largest)))
    return torch.cat(rows, 2)


def gated(mixer, inputs, out):
    return mixer.out(group_norm(out, mixer.norm, 1e-6) * torch.sigmoid(mixer.gate(inputs)))


def test_mlstm():
    mixer = build("mlstm", conv_width=0)
    mixer.gates.bias.zero_()
    assert relative_error(mixer(x())[0], gated(mixer, x(), stabilized_mlstm(mixer, x()))) < 1e-12


def test_mlstm_holds_in_float32_with_gates_at_their_ends():
    mixer = build("mlstm", index=1, conv_width=0)
    mixer.gates.weight.mul_(300)  # nearly every gate at one of its two ends
    mixer.gates.bias.zero_()
    raw = mixer.gates(x())
    assert raw.min() < -100
    assert raw.max() > 100
    expected = gated(mixer, x(), stabilized_mlstm(mixer, x()))
    assert relative_error(mixer(x())[0], expected) < 1e-11
    assert relative_error(mixer.float()(x().float())[0], expected) < 1e-4


@pytest.mark.parametrize(("steps", "negative", "largest"), [(1, False, 1), (3, True, 2)])
def test_delta_product(steps, negative, largest):
    fields = {"steps": steps, "allow_negative_eigenvalues": negative, "conv_width": 0}
    mixer = build("delta_product", expand_key=1.0, expand_value=1.0, **fields)
    q, k, v = heads(F.silu(mixer.qkv.linear(x())), 8, 8 * steps, 8 * steps)
    k, v = (part.unflatten(3, (steps, 8)) for part in (k, v))  # B H T steps K
    q, k = l2norm(q), l2norm(k)
    beta = largest * torch.sigmoid(mixer.beta(x())).unflatten(2, (HEADS, steps)).transpose(1, 2)
    decay = torch.exp(-mixer.rate_log.exp() * F.softplus(mixer.decay(x()) + mixer.step_bias)).transpose(1, 2)
    state, rows = torch.zeros(2, HEADS, 8, 8, dtype=torch.float64), []
    for t in range(TOKENS):
        state = decay[:, :, t, None, None] * state
        for step in range(steps):
            key, value = k[:, :, t, step, None], v[:, :, t, step, None]
            state = state + beta[:, :, t, step, None, None] * key.mT @ (value - key @ state)
        rows.append((q[:, :, t, None] @ state)[:, :, 0] / 8**0.5)
    out = rms(torch.stack(rows, 2), mixer.norm.norm.weight)
    # Initial step sizes are drawn in float32.
    assert relative_error(mixer(x())[0], mixer.out(merged(out) * F.silu(mixer.gate(x())))) < 1e-9


def test_ttt_linear():
    mixer = randomize(build("ttt_linear", conv_width=0, mini_batch=4, base_rate=0.5))
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    q, k = (part * (8 / (part.square().sum(-1, keepdim=True) + 1e-6)) ** 0.5 for part in (q, k))
    rate = torch.sigmoid(mixer.rate(x())).transpose(1, 2) / 16
    weight, bias = (part.view(HEADS, 1, 8) for part in (mixer.norm_weight, mixer.norm_bias))
    memory = mixer.start.view(HEADS, 9, 8).expand(2, -1, -1, -1)
    total, rows = torch.zeros_like(memory), []

    @torch.enable_grad()
    def gradient(memory, key, value):
        memory = memory.clone().requires_grad_()
        z = key @ memory[..., :8, :] + memory[..., 8:, :]
        error = (key + F.layer_norm(z, (8,), eps=1e-6) * weight + bias - value).square().sum() / 2
        return torch.autograd.grad(error, memory)[0]

    for t in range(TOKENS):
        query, key, value = (part[:, :, t, None] for part in (q, k, v))
        total = total + rate[:, :, t, None, None] * gradient(memory, key, value)
        now = memory - (1 / (t % 4 + 1) + mixer.extra_share[t % 4]).clamp(min=0) * total
        z = query @ now[..., :8, :] + now[..., 8:, :]
        rows.append((query + F.layer_norm(z, (8,), eps=1e-6) * weight + bias)[:, :, 0])
        if t % 4 == 3:
            memory, total = now, torch.zeros_like(total)
    out = rms(torch.stack(rows, 2), mixer.norm.norm.weight)
    assert relative_error(mixer(x())[0], mixer.out(merged(out) * F.silu(mixer.gate(x())))) < 1e-9


def elu(features):
    return F.elu(features) + 1


@pytest.mark.parametrize(("feature_map", "phi"), [("elu", elu), ("plain_elu", F.elu), ("relu", torch.relu)])
@pytest.mark.parametrize("over", ["head", "width"])
def test_norm_attention(feature_map, phi, over):
    mixer = build("trans_normer", index=2, feature_map=feature_map, norm_over=over, learned_angles=False)
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    weights = (rotated(phi(q)) @ rotated(phi(k)).mT / 8**0.5).tril()
    out = merged(rms(weights @ v, mixer.norm.norm.weight)) if over == "head" else rms(merged(weights @ v), 1)
    assert relative_error(mixer(x())[0], mixer.out(out)) < 1e-12


def test_learned_angles_are_rates_of_rotation():
    mixer, base = build("trans_normer", index=1), build("trans_normer", index=1, rope_base=2.0, learned_angles=False)
    mixer.rates.copy_(2.0 ** (-torch.arange(4, dtype=torch.float64) / 4))
    base.load_state_dict({key: value for key, value in mixer.state_dict().items() if key != "rates"})
    assert relative_error(mixer(x())[0], base(x())[0]) < 1e-12


def test_diag_attention_is_softmax_within_blocks():
    mixer = build("trans_normer", index=1, block=7, learned_angles=False)
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    block = torch.arange(TOKENS) // 7
    seen = (block[:, None] == block).tril()
    weights = (rotated(q) @ rotated(k).mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    assert relative_error(mixer(x())[0], mixer.out(merged(weights @ v))) < 1e-12


def test_lower_layers_are_diag_attention_as_the_share_says():
    for share, expected in ((0.5, [True, True, False, False]), (0.0, 4 * [False]), (1.0, 4 * [True])):
        assert [build("trans_normer", index=index, diag_share=share).diagonal for index in range(4)] == expected


def local(mixer, v):
    """The values' causal convolution, `[B,H,T,V]` -> `[B,T,D]`; zero without one."""
    if mixer.local is None:
        return 0
    weight, bias = mixer.local.weight, mixer.local.bias
    padded = F.pad(merged(v).transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight[:, None], bias, groups=WIDTH).transpose(1, 2)


POSITIONS = pytest.mark.parametrize("fields", [{}, {"lepe": 3}, {"rope": True}], ids=str)


@POSITIONS
def test_mala(fields):
    mixer = build("mala", conv_width=0, **fields)
    turned = rotated if "rope" in fields else lambda part: part
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    turned_score = turned(elu(q)) @ turned(elu(k)).mT / 8**0.5
    rows = []
    for t in range(TOKENS):
        mean = (elu(q[:, :, t, None]) @ elu(k[:, :, : t + 1]).mT / 8**0.5).mean(-1, keepdim=True)  # B H 1 1
        weights = (turned_score[:, :, t, None, : t + 1] * (1 + 1 / mean) - mean) / (t + 1)
        if not fields:
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 1, dtype=torch.float64))
        rows.append(weights @ v[:, :, : t + 1])
    out = (merged(torch.cat(rows, 2)) + local(mixer, v)) * mixer.gate(x())
    assert relative_error(mixer(x())[0], mixer.out(out)) < 1e-12
    if not fields:
        weights = magnitude_aware_weights(q.transpose(1, 2), k.transpose(1, 2))
        assert relative_error(merged(weights @ v) * mixer.gate(x()), out) < 1e-12


@POSITIONS
@pytest.mark.parametrize("over", ["head", "width"])
def test_nalaformer(over, fields):
    mixer = build("nalaformer", conv_width=0, norm_over=over, **fields)
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    q, k = 3 * q, 3 * k
    mixer.qkv.linear.weight[:32] *= 3
    length = q.norm(dim=-1, keepdim=True)
    power = 3 * (0.5 + torch.tanh(length))
    # The cosine between signs: 1 where a channel of the query and of the key agree, 0 where they are opposed.
    magnitude = (q / length).abs() ** power, k.abs() ** 3
    agree = (q[..., :, None, :].sign() == k[..., None, :, :].sign()).double()
    weights = torch.einsum("bhtr,bhjr,bhtjr->bhtj", *magnitude, agree).tril()
    seen = weights
    if "rope" in fields:
        parts = [
            [rotated(part * (sign * whole > 0)) for sign in (1, -1)]
            for part, whole in zip(magnitude, (q, k), strict=True)
        ]
        seen = sum(first @ second.mT for first, second in zip(*parts, strict=True)).tril()
    out = seen @ v / weights.sum(-1, keepdim=True)
    if over == "head":
        out = merged(
            rms(
                out + (local(mixer, v).unflatten(2, (HEADS, -1)).transpose(1, 2) if "lepe" in fields else 0),
                mixer.norm.norm.weight,
            )
        )
    else:
        out = F.layer_norm(merged(out) + local(mixer, v), (WIDTH,), mixer.norm.weight, mixer.norm.bias, 1e-6)
    # Lengths have 1e-6 added to their squares.
    assert relative_error(mixer(x())[0], mixer.out(out * F.silu(mixer.gate(x())))) < 1e-5


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
