"""GDN-2 and Mamba-3 against their papers' recurrences, written out token by token."""

import math

import pytest
import torch
import torch.nn.functional as F

from seqtrain.errors import ConfigError
from seqtrain.testing import relative_error
from tests.mixers.definition_cases import HEADS, TOKENS, build, heads, l2norm, merged, rms, x

pytestmark = pytest.mark.usefixtures("no_gradients")


def moved(name, **fields):
    """With vectors moved from where they start, so that none hides behind an initial 0 or 1."""
    mixer = build(name, **fields)
    for parameter in mixer.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.rand_like(parameter) * 0.5)
    return mixer


@pytest.mark.parametrize("negative", [False, True])
def test_gated_delta_net2(negative):
    mixer = moved("gated_delta_net2", conv_width=0, allow_negative_eigenvalues=negative)
    q, k, v = heads(F.silu(mixer.qkv.linear(x())), 8, 8, 8)
    q, k = l2norm(q), l2norm(k)
    erase, write = (heads(torch.sigmoid(gate(x())), 8)[0] for gate in (mixer.erase, mixer.write))
    erase = erase * (2 if negative else 1)
    (step,) = heads(F.softplus(mixer.decay(x()) + mixer.step_bias), 8)
    decay = torch.exp(-mixer.rate_log.exp()[:, None, None] * step)
    state, rows = torch.zeros(2, HEADS, 8, 8, dtype=torch.float64), []
    for t in range(TOKENS):
        column = k[:, :, t, :, None]
        taken = torch.eye(8, dtype=torch.float64) - column @ (erase * k)[:, :, t, None]
        state = taken @ (decay[:, :, t, :, None] * state) + column @ (write * v)[:, :, t, None]
        rows.append((q[:, :, t, None] @ state)[:, :, 0] / 8**0.5)
    out = rms(torch.stack(rows, 2), mixer.norm.norm.weight)
    assert relative_error(mixer(x())[0], mixer.out(merged(out) * torch.sigmoid(mixer.gate(x())))) < 1e-10


def test_equal_gates_make_kimi_delta_attention():
    """Erasing and writing by one number a head is KDA, which has its own code."""
    mixer, kda = moved("gated_delta_net2", gate_rank=4), moved("kda", gate_rank=4)
    mixer.gate.offset.zero_()
    carried = {key: value for key, value in kda.state_dict().items() if key != "beta.weight"}
    mixer.load_state_dict(carried, strict=False)
    for gate in (mixer.erase, mixer.write):
        gate.weight.copy_(kda.beta.weight.repeat_interleave(8, 0))
    assert relative_error(mixer(x())[0], kda(x())[0]) < 1e-10


@pytest.mark.parametrize(("groups", "turning"), [(1, 0.5), (2, 1.0)])
def test_mamba3(groups, turning):
    state_width = 8
    mixer = moved("mamba3", state=state_width, groups=groups, turning=turning)
    gate, inner, step, rate, share = mixer.project(x()).split([32, 32, HEADS, HEADS, HEADS], 2)
    (v,) = heads(inner, 16)
    dt = F.softplus(step + mixer.step_bias).transpose(1, 2)
    decay = torch.exp(-F.softplus(rate).clamp(min=1e-4).transpose(1, 2) * dt)
    share = torch.sigmoid(share).transpose(1, 2)
    theta = math.pi * torch.tanh(mixer.angle(x()))[:, None]  # B 1 T pairs
    pairs = int(turning * state_width / 2)

    def vectors(part, norm, bias):
        """`[B,H,T,N]`, not yet turned."""
        part = part.unflatten(2, (groups, state_width)).transpose(1, 2)
        part = part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        return part.repeat_interleave(HEADS // groups, 1) + bias.view(HEADS, 1, state_width)

    write, read = mixer.shared(x()).chunk(2, 2)
    b, c = (
        vectors(part, norm, bias)
        for part, norm, bias in (
            (write, mixer.write_norm, mixer.write_bias),
            (read, mixer.read_norm, mixer.read_bias),
        )
    )
    # The state is complex there, and turns itself; what B and C have in pairs are its real and imaginary parts.
    turn = torch.polar(torch.ones_like(theta), theta * dt[..., None])  # B H T pairs

    def as_complex(part):
        return torch.complex(part[..., :pairs], part[..., pairs : 2 * pairs]), part[..., 2 * pairs :]

    (b_turning, b_still), (c_turning, c_still) = as_complex(b), as_complex(c)
    turning_state = torch.zeros(2, HEADS, pairs, 16, dtype=torch.complex128)
    still = torch.zeros(2, HEADS, state_width - 2 * pairs, 16, dtype=torch.float64)
    rows = []
    for t in range(TOKENS):
        a, new = decay[:, :, t, None, None], (share * dt)[:, :, t, None, None]
        old = (1 - share[:, :, t, None, None]) * dt[:, :, t, None, None] * a

        def written(part, at):
            return part[:, :, at, :, None] * v[:, :, at, None]

        rotation = turn[:, :, t, :, None]
        turning_state = a * rotation.conj() * turning_state + new * written(b_turning, t)
        still = a * still + new * written(b_still, t)
        if t:
            turning_state = turning_state + old * rotation.conj() * written(b_turning, t - 1)
            still = still + old * written(b_still, t - 1)
        from_turning = torch.einsum("bhp,bhpv->bhv", c_turning[:, :, t].conj(), turning_state).real
        rows.append(from_turning + torch.einsum("bhn,bhnv->bhv", c_still[:, :, t], still))
    out = torch.stack(rows, 2) + v * mixer.skip[:, None, None]
    assert relative_error(mixer(x())[0], mixer.out(merged(out) * F.silu(gate))) < 1e-10


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"groups": 3}, r"mixer\.mamba3\.groups=3: must divide model.heads=2"),
        ({"state": 4, "turning": 0.25}, r"mixer\.mamba3\.turning=0\.25: leaves no pair of 4 channels to turn"),
    ],
)
def test_what_mamba3_can_not_be(fields, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        build("mamba3", **fields)
