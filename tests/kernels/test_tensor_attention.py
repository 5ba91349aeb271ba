"""tensor_attention: the chunked form against the float64 loop, and the loop against exact attention over pairs."""

import math
from importlib import import_module
from itertools import pairwise

import pytest
import torch

from seqtrain.kernels import feature_count, tensor_attention
from seqtrain.kernels.tensor_attention.features import features, monomials
from seqtrain.testing import assert_within, boundaries, compare_with_oracle, relative_error

H, K, V = 2, 3, 5
NAMES = ("q", "k1", "k2", "v1", "v2")


def inputs(batch, tokens, seed=0, width=K):
    generator = torch.Generator().manual_seed(seed)
    sizes = (width, width, width, V, V)
    return {
        name: torch.randn(batch, tokens, H, size, generator=generator, dtype=torch.float64)
        for name, size in zip(NAMES, sizes, strict=True)
    }


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
def test_many_segments(monkeypatch, documents):
    # By import_module: the package's name is the function's in seqtrain.kernels.
    monkeypatch.setattr(import_module("seqtrain.kernels.tensor_attention.chunked"), "SEGMENT", 500)
    options = {"cu_seqlens": boundaries([1, 43, 0, 86])} if documents else {}
    assert_within(compare_with_oracle(tensor_attention, inputs(1, 130), **options), torch.float32)


@pytest.mark.parametrize("degree", [2, 4])
def test_the_error_falls_as_the_bound_to_the_power_after_the_degree(degree):
    """The bounded-entries regime: vectors of length 1 and an exponent of at most `bound`, which goes to 0."""
    tensors = inputs(1, 24, width=3)
    for name in ("q", "k1", "k2"):
        tensors[name] = torch.nn.functional.normalize(tensors[name], dim=-1)
    largest = tensors["v1"].abs().max() * tensors["v2"].abs().max()
    errors = []
    for bound in (0.8, 0.4, 0.2, 0.1):
        exact, _ = tensor_attention(**tensors, degree=None, scale=bound)
        came, _ = tensor_attention(**tensors, degree=degree, scale=bound, backend="chunked")
        weight_error = math.exp(bound) * bound ** (degree + 1) / math.factorial(degree + 1)
        errors.append((came - exact).abs().max().item())
        assert errors[-1] <= 2 * weight_error / (1 - weight_error) * largest
    falls = [math.log2(before / after) for before, after in pairwise(errors)]
    assert all(fall == pytest.approx(degree + 1, abs=0.3) for fall in falls), falls


def test_documents_equal_separate_calls_exactly_too():
    tensors = inputs(1, 12)
    packed, _ = tensor_attention(**tensors, degree=None, cu_seqlens=boundaries([5, 0, 7]))
    alone, _ = tensor_attention(**{name: x[:, 5:] for name, x in tensors.items()}, degree=None)
    assert relative_error(packed[:, 5:], alone) < 1e-12


@pytest.mark.parametrize(("width", "degree"), [(1, 4), (3, 2), (4, 3)])
def test_features_multiply_to_the_polynomial(width, degree):
    x, y, z = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    came = (features(x, degree) * features(y, degree) * features(z, degree)).sum()
    exponent = (x * y * z).sum()
    expected = sum(exponent**p / math.factorial(p) for p in range(degree + 1))
    torch.testing.assert_close(came, expected)
    assert len(monomials(width, degree)) == feature_count(width, degree)
