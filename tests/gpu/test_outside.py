"""Kernels of other packages that are installed: each agrees with the chunked form, on small cases and a long row."""

import importlib

import pytest
import torch

from seqtrain.kernels import OPERATORS, outside
from seqtrain.testing import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BACKENDS = [(name, backend) for name, x in OPERATORS.items() for backend in x.backends if backend in outside.NAMES]


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_a_package_agrees_with_the_chunked_form(name, backend):
    package = OPERATORS[name].__module__
    if reason := importlib.import_module(f"{package}.{backend}").unavailable():
        pytest.skip(reason)
    assert outside.disagreement(package, backend, "cuda") is None


@pytest.mark.parametrize("backend", [backend for name, backend in BACKENDS if name == "delta_rule"])
def test_a_long_row_is_that_of_our_own_kernels(backend):
    operator = OPERATORS["delta_rule"]
    if reason := importlib.import_module(f"{operator.__module__}.{backend}").unavailable():
        pytest.skip(reason)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 4096, 16, 128, generator=generator, device="cuda").bfloat16() for _ in "qkv")
    k, beta = torch.nn.functional.normalize(k, dim=-1), torch.rand(1, 4096, 16, generator=generator, device="cuda")
    results = [operator(q, k, v, beta, -beta / 8, backend=each) for each in (backend, "triton")]
    assert all(relative_error(came, expected) < 1e-2 for came, expected in zip(*results, strict=True))
