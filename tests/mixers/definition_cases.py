"""What tests of mixers against their papers' formulas share: small layers, one input, heads in and out."""

import torch

from seqtrain.mixers import MIXERS, LayerShape

WIDTH, HEADS, TOKENS = 16, 2, 30


def build(name, *, index=0, heads=HEADS, **fields):
    """A float64 layer of 4, norms' weights drawn so that they show."""
    torch.manual_seed(4)
    cls = MIXERS.get(name)
    mixer = cls(cls.Config(**fields), LayerShape(WIDTH, heads, index, 4)).double()
    with torch.no_grad():
        for key, parameter in mixer.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
    return mixer


def x(tokens=TOKENS):
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def heads(projected, *widths):
    """`[B,T,H*w + ...]` -> `[B,H,T,w]` each."""
    return [part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in projected.split([HEADS * w for w in widths], 2)]


def merged(out):
    return out.transpose(1, 2).flatten(2)  # B H T V -> B T H*V


def rms(out, weight):
    return out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(part, base=10000.0):
    """`[B,H,T,K]` turned by position, channel i with channel i + K/2."""
    half = part.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(part.shape[2], dtype=torch.float64)[:, None] * rates
    turned = torch.complex(part[..., :half], part[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def l2norm(part):
    """Of length 1 along the last dimension."""
    return part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def decayed(q, k, v, decay):
    """`S = diag(a) S + k^T v`, token by token, on `[B,H,T,*]`, read by `q / sqrt(K)`."""
    state, out = torch.zeros(2, HEADS, q.shape[-1], v.shape[-1], dtype=torch.float64), []
    for t in range(q.shape[2]):
        state = decay[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2) * q.shape[-1] ** -0.5
