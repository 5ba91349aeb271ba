"""The short convolution's kernels against the float64 loop: every width, dilation, states, documents, any order."""

from importlib import import_module

import pytest
import torch

from seqtrain.kernels import short_convolution
from seqtrain.kernels.inspect.interpreter import assert_no_races, between_nans, nan_filled_empty, recording
from seqtrain.testing import boundaries, compare_with_oracle
from tests.kernels.test_short_convolution import case

from .tolerances import assert_within


def check(tensors, dtype=torch.float64, **options):
    with nan_filled_empty():
        errors = compare_with_oracle(short_convolution, tensors, backend="triton", dtype=dtype, **options)
    assert_within(errors, dtype)


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("tokens", [6, 33])
def test_the_algebra(tokens, width, activation, documents):
    tensors, cu_seqlens = case(tokens, width, documents=documents, bias=activation == "silu")
    check(tensors, activation=activation, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("dilation", [3, 16])
def test_dilated_taps_in_pieces(dilation, monkeypatch):
    monkeypatch.setattr(import_module("seqtrain.kernels.short_convolution.triton"), "SHORTEST", 20)
    tensors, cu_seqlens = case(70, 3, documents=True, dilation=dilation)
    with recording(order="shuffled") as launches:
        check(tensors, activation="silu", dilation=dilation, cu_seqlens=cu_seqlens)
    assert_no_races(launches)
    assert [launch.kernel for launch in launches] == ["forward", "backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    tensors, cu_seqlens = case(130, documents=True)
    check(tensors, dtype, activation="silu", cu_seqlens=cu_seqlens)


def test_documents_do_not_see_each_other():
    tensors, _ = case(64)
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    x, cu_seqlens = x[:1], boundaries([20, 30, 14])
    poisoned = between_nans(x)
    poisoned[:, :20] = float("nan")
    poisoned[:, 50:] = float("nan")
    found = []
    for each in (x.clone(), poisoned):
        each.requires_grad_()
        out, final = short_convolution(each, weight, bias, activation="silu", cu_seqlens=cu_seqlens, backend="triton")
        (dx,) = torch.autograd.grad([out[:, 20:50].sum() + final[1].sum()], [each])
        found.append((out[:, 20:50], final[1], dx[:, 20:50]))
    for clean, came in zip(*found, strict=True):
        assert torch.equal(clean, came)
