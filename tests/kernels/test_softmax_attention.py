"""Softmax attention against one masked softmax and by blocks of keys; tensor attention against exact pairs."""

import math
from importlib import import_module
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from seqtrain.kernels import feature_count, softmax_attention, tensor_attention
from seqtrain.kernels.linear_cross_entropy import soft_cap
from seqtrain.kernels.native.build import unavailable
from seqtrain.kernels.softmax_attention import blocks, chunked
from seqtrain.kernels.softmax_attention.blocks import attend, attend_gradients
from seqtrain.kernels.tensor_attention.features import features, monomials
from seqtrain.planning.trace import Tracer
from seqtrain.testing import TOLERANCES, assert_within, boundaries, compare_with_oracle, relative_error
from tests.kernels.contract_cases import Case, check

H, G, K = 4, 2, 8
NEEDS_NATIVE = pytest.mark.skipif(unavailable() is not None, reason=f"native {unavailable()}")


@pytest.fixture(params=["chunked", pytest.param("native", marks=NEEDS_NATIVE)])
def backend(request):
    return request.param


def test_long_documents_next_to_short_ones(backend):
    check(Case(softmax_attention), backend, 1311, torch.float32, lengths=[3, 1100, 2, 150, 51, 5], past=True)


@NEEDS_NATIVE
@pytest.mark.parametrize("options", [{}, {"window": 140}, {"window": 300, "score_cap": 0.7}], ids=str)
def test_many_threads_share_rows_of_many_blocks(options, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    for past in (False, True):
        check(Case(softmax_attention, options), "native", 817, torch.float32, past=past)


@NEEDS_NATIVE
def test_scores_far_from_zero():
    """Of some queries all scores lie below -1e4, of others above 1e4: none overflows, and the largest rise by block."""
    q, k, v = Case(softmax_attention).tensors(300, batch=1, dtype=torch.float32).values()
    tensors = {"q": 30 * q, "k": k * torch.linspace(1, 100, 300)[:, None, None], "v": v}
    wide = {name: x.double() for name, x in tensors.items()}
    out, _ = softmax_attention(**tensors, backend="native")
    # A score of 1e4 is known to 1e-3 in float32, and so is its weight.
    assert relative_error(out, softmax_attention(**wide, backend="reference")[0]) < 3e-3


@pytest.mark.parametrize("options", [{"window": 5}, {"window": 100, "score_cap": 0.7}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("values", [K, 2 * K])
def test_wide_values_and_windows(values, options, backend):
    for lengths in (None, [0, 0, 1, 3, 0, 30, 27, 0]):
        case = Case(softmax_attention, options, sizes={"V": values})
        check(case, backend, 61, torch.float32, lengths=lengths, past=True)


def test_the_definition_is_softmax_attention():
    q, k, v = Case(softmax_attention).tensors(20).values()
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.repeat_interleave(H // G, 2).transpose(1, 2),
        v.repeat_interleave(H // G, 2).transpose(1, 2),
        is_causal=True,
    )
    out, state = softmax_attention(q, k, v, backend="reference")
    assert relative_error(out, expected.transpose(1, 2)) < 1e-14
    assert torch.equal(state["k"], k)
    out, _ = softmax_attention(q, k, v, window=1, backend="reference")
    assert torch.allclose(out, v.repeat_interleave(H // G, 2))


def test_a_window_holds_no_mask_that_grows_with_the_tokens():
    q = torch.randn(1, 4096, 1, 8, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.untyped_storage().size()) or x, lambda x: x):
        softmax_attention(q, q, q, window=64, backend="chunked")
    assert sizes
    # The inputs, and masks of 64 x 128: a mask over all keys would have 16 million entries, one a block 512 thousand.
    assert max(sizes) <= 4 * q.numel()


def test_a_past_of_the_wrong_length_is_refused():
    q, k, v = Case(softmax_attention).tensors(4, dtype=torch.float32).values()
    state = {"k": k, "v": v, "length": torch.tensor([4, 5])}
    with pytest.raises(ValueError, match=r"length\] is \(4, 5\), but must be at most the S=4 rows"):
        softmax_attention(q, k, v, initial_state=state)


@pytest.mark.parametrize("window", [None, 16], ids=["full", "window"])
def test_one_document_costs_what_a_row_does(window):
    def cost(cu_seqlens):
        tracer = Tracer()
        q, k, v = (tracer.empty(1, 61, H, K, requires_grad=True) for _ in range(3))
        with tracer, tracer.record() as work:
            chunked.run(q, k, v, window, 0.5, 0.0, None, cu_seqlens)
        return vars(work)

    assert cost(boundaries([61])) == cost(None)


SCALE = 0.4
# Of the log-sum-exp, float32 at least. In bfloat16 PyTorch's fused kernel was 1.4e-5 off on one thread of an AMD EPYC.
LOG_SUM_TOLERANCES = {torch.float64: TOLERANCES[torch.float64], torch.float32: 1e-5, torch.bfloat16: 3e-5}


def inputs(queries, keys, dtype, *, heads=4, groups=2, key_width=6, value_width=5):
    generator = torch.Generator().manual_seed(queries)
    shapes = [(queries, heads, key_width), (keys, groups, key_width), (keys, groups, value_width)]
    tensors = [torch.randn(2, *shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]
    return tensors, torch.randn(2, queries, heads, value_width, dtype=torch.float64, generator=generator).to(dtype)


def definition(q, k, v, causal, cap):
    """Output and log-sum-exp in float64, with gradients."""
    k, v = (rows.repeat_interleave(q.shape[2] // k.shape[2], 2) for rows in (k, v))
    scores = SCALE * torch.einsum("bthk,bshk->bhts", q, k)
    scores = soft_cap(scores, cap)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(("fused", "cap"), [(False, 0), (True, 0), (True, 0.7)], ids=["plain", "fused", "capped"])
def test_one_block_is_attention(fused, cap, causal, dtype, monkeypatch):
    monkeypatch.setattr(blocks, "QUERIES", 4)
    (q, k, v), d_out = inputs(11, 11 if causal else 7, dtype)
    out, lse = attend(q, k, v, scale=SCALE, causal=causal, cap=cap, fused=fused)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    true_out, true_lse = definition(*leaves, causal, cap)
    true_out.backward(d_out.double())
    gradients = attend_gradients(d_out, q, k, v, out, lse, scale=SCALE, causal=causal, cap=cap, fused=fused)
    assert relative_error(out, true_out) < TOLERANCES[dtype]
    assert relative_error(lse, true_lse) < LOG_SUM_TOLERANCES[dtype]
    for came, leaf in zip(gradients, leaves, strict=True):
        assert came.dtype == dtype
        assert relative_error(came, leaf.grad) < TOLERANCES[dtype]


def tensors_of(tokens, width=3):
    return Case(tensor_attention, sizes={"H": 2, "K": width}).tensors(tokens, batch=1)


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
def test_many_segments(monkeypatch, documents):
    # By import_module: the package's name is the function's in seqtrain.kernels.
    monkeypatch.setattr(import_module("seqtrain.kernels.tensor_attention.chunked"), "SEGMENT", 500)
    options = {"cu_seqlens": boundaries([1, 43, 0, 86])} if documents else {}
    assert_within(compare_with_oracle(tensor_attention, tensors_of(130), **options), torch.float32)


@pytest.mark.parametrize("degree", [2, 4])
def test_the_error_falls_as_the_bound_to_the_power_after_the_degree(degree):
    """The bounded-entries regime: vectors of length 1 and an exponent of at most `bound`, which goes to 0."""
    tensors = tensors_of(24, width=3)
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
    tensors = tensors_of(12)
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
