"""short_convolution: shifted sums and their gradients against the float64 loop, states, documents, every width."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from seqtrain.kernels import short_convolution
from seqtrain.testing import assert_within, boundaries, compare_with_oracle, relative_error

D = 6


def case(tokens, width=4, *, documents=False, bias=True, dilation=1):
    generator = torch.Generator().manual_seed(tokens)
    lengths = [0, 1, tokens // 3, 0, tokens - tokens // 3 - 3, 2, 0]
    rows = len(lengths) if documents else 2

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "x": normal(1 if documents else 2, tokens, D),
        "weight": normal(D, width),
        "bias": normal(D) if bias else None,
        "initial_state": normal(rows, (width - 1) * dilation, D),
    }
    return tensors, boundaries(lengths) if documents else None


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("dilation", [3, 16])
@pytest.mark.parametrize("tokens", [17, 130])
def test_dilated_taps(tokens, dilation, documents):
    tensors, cu_seqlens = case(tokens, 3, documents=documents, dilation=dilation)
    options = {"activation": "silu", "dilation": dilation, "cu_seqlens": cu_seqlens}
    assert_within(compare_with_oracle(short_convolution, tensors, **options), torch.float32)


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
def test_many_blocks(monkeypatch, documents):
    monkeypatch.setattr(import_module("seqtrain.kernels.short_convolution.chunked"), "BLOCK", 5 * D)
    for dilation in (1, 4):
        tensors, cu_seqlens = case(63, documents=documents, dilation=dilation)
        options = {"activation": "silu", "dilation": dilation, "cu_seqlens": cu_seqlens}
        assert_within(compare_with_oracle(short_convolution, tensors, **options), torch.float32)


@pytest.mark.parametrize("dilation", [1, 5])
def test_it_is_the_causal_convolution(dilation):
    tensors, _ = case(20)
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    padded = F.pad(x.transpose(1, 2), (3 * dilation, 0))
    expected = F.conv1d(padded, weight[:, None], bias, groups=D, dilation=dilation).transpose(1, 2)
    assert relative_error(short_convolution(x, weight, bias, dilation=dilation)[0], expected) < 1e-14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation='gelu', expected 'silu' or 'none'"),
        ({"dilation": 0}, "dilation=0, expected at least 1"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        short_convolution(torch.zeros(1, 5, D), torch.zeros(D, 4), **change)
