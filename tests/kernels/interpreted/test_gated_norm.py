"""The kernels of norm and gate against their definition: heads, groups, both places of the gate, slices, any order."""

import pytest
import torch

from seqtrain.kernels import gated_norm, gpu
from seqtrain.kernels.gated_norm import triton
from seqtrain.kernels.inspect.interpreter import assert_no_races, nan_filled_empty, recording
from tests.kernels.test_gated_norm import case, errors_of

from .tolerances import assert_within


@pytest.mark.parametrize("gate", ["none", "silu", "sigmoid", "first"])
@pytest.mark.parametrize("own", [False, True], ids=["one weight", "weight per head"])
@pytest.mark.parametrize("width", [16, 100])
def test_the_algebra(width, own, gate):
    tensors, options = case(width, own=own, gate=gate)
    with recording(order="shuffled") as launches, nan_filled_empty():
        errors = errors_of("triton", tensors, options, torch.float64)
    assert_within(errors, torch.float64)
    assert_no_races(launches)
    assert [launch.kernel for launch in launches] == ["forward", "backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["silu", "first"])
def test_other_dtypes(gate, dtype):
    tensors, options = case(100, own=False, gate=gate)
    assert_within(errors_of("triton", tensors, options, dtype), dtype)


@pytest.mark.parametrize("own", [False, True], ids=["one weight", "weight per head"])
def test_a_program_sums_over_its_tiles(own, monkeypatch):
    monkeypatch.setattr(gpu, "PROGRAMS", 1)
    monkeypatch.setattr(triton, "TILE", 256)  # two rows
    tensors, options = case(100, own=own, gate="silu")
    assert_within(errors_of("triton", tensors, options, torch.float64), torch.float64)


def test_slices_of_a_projection_are_read_in_place():
    tensors, options = case(16, own=False, gate="silu")
    both = torch.randn(2, 5, 2, 3 * 16)
    x, gate = (part.unflatten(2, (3, 16)) for part in both.unbind(2))
    weight = tensors["weight"].float()
    with recording() as launches:
        out = gated_norm(x, weight, gate, backend="triton", **options)
    assert "x+gate" in launches[0].traffic
    expected = gated_norm(x, weight, gate, backend="reference", **options)
    torch.testing.assert_close(out, expected)
