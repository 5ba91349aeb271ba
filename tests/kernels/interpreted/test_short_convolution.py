"""The short convolution's kernels against the float64 loop: every width, dilation, states, documents, any order."""

from importlib import import_module

import pytest
import torch

from seqtrain.kernels import short_convolution
from seqtrain.kernels.inspect.interpreter import assert_no_races, between_nans, nan_filled_empty, recording
from seqtrain.testing import compare_with_oracle
from tests.kernels.isolation import TOKENS, assert_documents_apart
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
    tensors = {name: x for name, x in case(TOKENS)[0].items() if name != "initial_state"}
    tensors["x"] = tensors["x"][:1]
    assert_documents_apart(short_convolution, tensors, "triton", copied=between_nans, activation="silu")
