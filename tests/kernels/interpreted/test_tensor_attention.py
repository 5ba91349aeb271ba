"""Tensor attention's kernels against the float64 definition: features, documents, several segments, any order."""

from importlib import import_module

import pytest
import torch

from seqtrain.kernels import tensor_attention
from seqtrain.kernels.inspect.interpreter import assert_no_races, nan_filled_empty, recording
from seqtrain.testing import boundaries, compare_with_oracle

from .tolerances import assert_within


def case(tokens, *, width=3, value=20, documents=False):
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = [0, 1, tokens // 3, tokens - tokens // 3 - 1]
    batch = 1 if documents else 2
    tensors = {name: normal(batch, tokens, 2, width) for name in ("q", "k1", "k2")}
    tensors |= {name: normal(batch, tokens, 2, value) for name in ("v1", "v2")}
    return tensors, boundaries(lengths) if documents else None


# The gradient of q is a difference of what nearly cancels: the PyTorch form errs by the same 2.1e-6 on the case below.
WIDER = {torch.float32: {"grad q": 5e-6}}


def check(tensors, dtype=torch.float64, **options):
    with nan_filled_empty():
        errors = compare_with_oracle(tensor_attention, tensors, backend="triton", dtype=dtype, **options)
    assert_within(errors, dtype, wider=WIDER.get(dtype, {}))


@pytest.mark.parametrize(
    ("tokens", "width", "value", "degree", "documents"),
    [(7, 3, 20, 2, True), (20, 4, 40, 2, False), (20, 2, 8, 4, True)],
)
def test_the_algebra(tokens, width, value, degree, documents):
    tensors, cu_seqlens = case(tokens, width=width, value=value, documents=documents)
    with recording() as launches:
        check(tensors, degree=degree, cu_seqlens=cu_seqlens)
    assert launches


def test_a_state_goes_in_and_its_gradient_comes_out():
    tensors, _ = case(20)
    _, state = tensor_attention(**tensors, backend="reference")
    check({**tensors, "initial_state": state})


def test_segments_and_programs_in_any_order(monkeypatch):
    monkeypatch.setattr(import_module("seqtrain.kernels.tensor_attention.triton"), "SEGMENT", 1000)
    tensors, cu_seqlens = case(40, documents=True)
    with recording(order="shuffled") as launches:
        check(tensors, cu_seqlens=cu_seqlens)
    assert_no_races(launches)
    assert {launch.kernel for launch in launches} == {"outputs", "gradients"}
    assert len(launches) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    tensors, cu_seqlens = case(40, documents=True)
    check(tensors, dtype, cu_seqlens=cu_seqlens)
