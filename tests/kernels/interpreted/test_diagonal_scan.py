"""The diagonal scan's kernel against the float64 loop: decays to -80, documents, complex numbers, pieces, any order."""

from importlib import import_module

import pytest
import torch

from seqtrain.kernels import diagonal_scan
from seqtrain.kernels.inspect.interpreter import assert_no_races, between_nans, nan_filled_empty, recording
from seqtrain.testing import compare_with_oracle
from tests.kernels.isolation import TOKENS, assert_documents_apart
from tests.kernels.test_diagonal import case

from .tolerances import assert_within


@pytest.fixture
def in_pieces(monkeypatch):
    """Documents of more than 16 tokens are cut."""
    monkeypatch.setattr(import_module("seqtrain.kernels.diagonal_scan.triton"), "SHORTEST", 16)


def check(tensors, dtype=torch.float64, **options):
    with nan_filled_empty():
        errors = compare_with_oracle(diagonal_scan, tensors, backend="triton", dtype=dtype, **options)
    assert_within(errors, dtype)


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("decay", ["wide", "spikes", "zero"])
@pytest.mark.parametrize("tokens", [2, 33, 130])
def test_the_algebra(tokens, decay, documents):
    tensors, cu_seqlens = case(tokens, documents=documents, decay=decay)
    check(tensors, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("constant", [False, True], ids=["gates", "constant"])
@pytest.mark.parametrize(("x_complex", "a_complex"), [(True, True), (False, True), (True, False), (False, False)])
def test_complex_numbers_in_pieces(x_complex, a_complex, constant, in_pieces):
    tensors, cu_seqlens = case(60, documents=True, x_complex=x_complex, a_complex=a_complex, constant=constant)
    check(tensors, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("dtype", "decay"),
    [
        (torch.float32, "wide"),
        (torch.float32, "strong"),
        (torch.bfloat16, "spikes"),
        (torch.bfloat16, "strong"),
        (torch.float16, "wide"),
    ],
)
def test_other_dtypes(dtype, decay, in_pieces):
    tensors, cu_seqlens = case(130, documents=True, decay=decay)
    check(tensors, dtype, cu_seqlens=cu_seqlens)


def test_complex_float32():
    tensors, _ = case(130, x_complex=True, a_complex=True)
    check(tensors, torch.float32)


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_programs_in_any_order_without_races(order, in_pieces):
    tensors, cu_seqlens = case(100, documents=True)
    with recording(order=order) as launches:
        check(tensors, cu_seqlens=cu_seqlens)
    assert_no_races(launches)
    assert [launch.kernel for launch in launches] == ["scan"] * 4


def test_documents_do_not_see_each_other():
    tensors = {name: x[:1] for name, x in case(TOKENS)[0].items()} | {"initial_state": torch.randn(3, 5)}
    assert_documents_apart(diagonal_scan, tensors, "triton", copied=between_nans)
