"""The native tensor attention against the float64 loop."""

import ctypes

import pytest
import torch

from seqtrain.kernels import tensor_attention
from seqtrain.kernels.native import build
from seqtrain.kernels.native import tensor_attention as native
from seqtrain.testing import assert_within, compare_with_oracle, relative_error, run_with_gradients
from tests.kernels.isolation import TOKENS, assert_documents_apart
from tests.kernels.test_tensor_attention import case, inputs

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"native {build.unavailable()}")


@pytest.mark.parametrize(("key_width", "value_width"), [(1, 1), (6, 16), (4, 33)])
def test_any_width(key_width, value_width):
    generator = torch.Generator().manual_seed(1)
    tensors = inputs(1, 70, width=key_width) | {
        name: torch.randn(1, 70, 2, value_width, generator=generator, dtype=torch.float64) for name in ("v1", "v2")
    }
    assert_within(compare_with_oracle(tensor_attention, tensors, backend="native"), torch.float32)


def test_inputs_of_mixed_dtypes():
    tensors, cu_seqlens = case(130, 2, documents=True)
    mixed = {name: x.bfloat16() if name in ("q", "v2") else x.float() for name, x in tensors.items()}
    alike = {name: x.float() for name, x in mixed.items()}
    came = tensor_attention(**mixed, cu_seqlens=cu_seqlens, backend="native")[0]
    expected = tensor_attention(**alike, cu_seqlens=cu_seqlens, backend="native")[0]
    assert torch.equal(came, expected)


def test_documents_do_not_see_each_other():
    assert_documents_apart(tensor_attention, inputs(1, TOKENS), "native")


def test_threads_change_nothing(monkeypatch):
    tensors = {name: x.float() for name, x in inputs(3, 90).items()}
    results = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(run_with_gradients(tensor_attention, tensors, backend="native"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_long_sums_keep_their_precision():
    tensors = {name: x.abs() for name, x in inputs(1, 6000, width=1).items()}
    came = tensor_attention(**{name: x.float() for name, x in tensors.items()}, backend="native")
    expected = tensor_attention(**tensors, backend="chunked")
    # One running sum of so many terms would be wrong by 1e-5.
    assert all(relative_error(x, y) < 1e-6 for x, y in zip(came, expected, strict=True))


def test_the_operator_passes_pytorch_s_own_check():
    tensors, cu_seqlens = case(20, 2, documents=True)
    leaves = [x.float().requires_grad_() for x in tensors.values()]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(native.TENSOR_ATTENTION.op, (*leaves, cu_seqlens, 2, 0.5, True), test_utils=checks)


def test_both_sides_agree_on_the_call():
    assert build.library().seqtrain_tensor_call_size() == ctypes.sizeof(native._Call)
