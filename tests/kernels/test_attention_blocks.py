"""Attention to blocks of keys: fused or not, merged blocks and their gradients are those of all keys at once."""

import pytest
import torch

from seqtrain.kernels.softmax_attention import blocks
from seqtrain.kernels.softmax_attention.blocks import attend, attend_gradients, merge
from seqtrain.testing import TOLERANCES, relative_error

SCALE = 0.4
# Of the log-sum-exp, float32 at least. In bfloat16 PyTorch's fused kernel was 1.4e-5 off on one thread of an AMD EPYC.
LOG_SUM_TOLERANCES = {torch.float64: TOLERANCES[torch.float64], torch.float32: 1e-5, torch.bfloat16: 3e-5}


def inputs(queries, keys, dtype, *, heads=4, groups=2, key_width=6, value_width=5):
    generator = torch.Generator().manual_seed(queries)
    shapes = [(queries, heads, key_width), (keys, groups, key_width), (keys, groups, value_width)]
    tensors = [torch.randn(2, *shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]
    return tensors, torch.randn(2, queries, heads, value_width, dtype=torch.float64, generator=generator).to(dtype)


def definition(q, k, v, causal):
    """Output and log-sum-exp in float64, with gradients."""
    k, v = (rows.repeat_interleave(q.shape[2] // k.shape[2], 2) for rows in (k, v))
    scores = SCALE * torch.einsum("bthk,bshk->bhts", q, k)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_one_block_is_attention(fused, causal, dtype, monkeypatch):
    monkeypatch.setattr(blocks, "QUERIES", 4)
    (q, k, v), d_out = inputs(11, 11 if causal else 7, dtype)
    out, lse = attend(q, k, v, scale=SCALE, causal=causal, fused=fused)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    true_out, true_lse = definition(*leaves, causal)
    true_out.backward(d_out.double())
    gradients = attend_gradients(d_out, q, k, v, out, lse, scale=SCALE, causal=causal, fused=fused)
    assert relative_error(out, true_out) < TOLERANCES[dtype]
    assert relative_error(lse, true_lse) < LOG_SUM_TOLERANCES[dtype]
    for came, leaf in zip(gradients, leaves, strict=True):
        assert came.dtype == dtype
        assert relative_error(came, leaf.grad) < TOLERANCES[dtype]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_blocks_merge_to_all_keys(fused):
    (q, k, v), d_out = inputs(9, 20, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    true_out, true_lse = definition(*leaves, False)
    true_out.backward(d_out)
    q, k, v = (x.detach() for x in leaves)
    pieces = list(zip(k.split([3, 1, 16], 1), v.split([3, 1, 16], 1), strict=True))
    out, lse = torch.zeros_like(true_out), torch.full_like(true_lse, -torch.inf)
    for keys, values in pieces:
        out, lse = merge(out, lse, *attend(q, keys, values, scale=SCALE, causal=False, fused=fused))
    assert relative_error(out, true_out) < 1e-14
    assert relative_error(lse, true_lse) < 1e-14
    parts = [
        attend_gradients(d_out, q, keys, values, out, lse, scale=SCALE, causal=False, fused=fused)
        for keys, values in pieces
    ]
    came = [sum(part[0] for part in parts), *(torch.cat([part[which] for part in parts], 1) for which in (1, 2))]
    for mine, leaf in zip(came, leaves, strict=True):
        assert relative_error(mine, leaf.grad) < 1e-13
