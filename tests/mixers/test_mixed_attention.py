"""TCNCA and the intra-layer hybrid from their definitions, with explicit masks."""

import math

import pytest
import torch
import torch.nn.functional as F

from seqtrain.testing import relative_error
from tests.mixers.definition_cases import TOKENS, WIDTH, decayed, heads, merged, rms, rotated, x
from tests.mixers.definition_cases import build as build_plain


def build(name, **fields):
    """With vectors moved from where they start, so that none hides behind an initial 0 or 1."""
    mixer = build_plain(name, index=1, **fields)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) * 0.5)
    return mixer


def attention(q, k, v, seen):
    scores = rotated(q) @ rotated(k).mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


QUERY, KEY = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)


@torch.no_grad()
def test_tcnca():
    mixer = build("tcnca", chunk=7, conv_width=3, conv_depth=2, dilation=4)
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
    expected = update.sigmoid() * F.silu(candidate + mixer.out(F.silu(gate) * out))
    assert relative_error(mixer(x())[0], expected) < 1e-11


@torch.no_grad()
def test_tcnca_reaches_as_far_as_its_convolution_and_its_chunk():
    mixer = build("tcnca", chunk=8, conv_width=3, conv_depth=2, dilation=3)
    u, changed = x(), x()
    changed[:, 3] += 1
    touched = (mixer(u)[0] - mixer(changed)[0]).abs().amax((0, 2)).nonzero()[:, 0].tolist()
    # 1 + 2 (1 + 3) tokens of convolution from token 3 on: to 11, and from there to the end of that chunk, 15.
    assert touched == list(range(3, 16))


@pytest.mark.parametrize("full", [False, True])
@torch.no_grad()
def test_the_intra_layer_hybrid(full):
    mixer = build("intra_hybrid", window=5, full=full)
    q, k, v = heads(mixer.qkv.linear(x()), 8, 8, 8)
    (decay,) = heads(torch.sigmoid(mixer.forget(x())) ** (1 / 16), 8)
    branches = [decayed(q, k, v, decay), attention(q, k, v, (KEY <= QUERY) & (KEY > QUERY - 5))]
    branches += [attention(q, k, v, KEY <= QUERY)] if full else []
    pairs = zip(branches, mixer.norms, strict=True)
    summed = sum(merged(rms(branch, norm.norm.weight)) for branch, norm in pairs)
    assert relative_error(mixer(x())[0], mixer.out(summed)) < 1e-11
    assert mixer.constant_state == (not full)
